"""``recalibrate_batch_norm``: new running statistics for averaged weights.

The running statistics of a BatchNorm layer were gathered with the live weights and do not fit the
averaged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ema.errors import ArgumentError, ArgumentTypeError, ModelError, StateError, listing
from ema.torch_backend.tensors.names import unwrap

__all__ = ["recalibrate_batch_norm"]


@torch.no_grad()
def recalibrate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> None:
    """Recompute the running statistics of BatchNorm layers in one pass over ``batches``.

    Each layer gets the mean and the unbiased variance of all values that it saw, over all
    batches together::

        mean = Σ x / N,    var = Σ (x − mean)² / (N − 1)

    (``torch.optim.swa_utils.update_bn`` takes the mean of the variances of the batches, which
    misses how their means differ, and lets a last small batch count as much as the others.)
    Everything else is in evaluation mode on the way, so Dropout does nothing, as when the model
    is used. Afterwards training mode, momentum and every other buffer are as before. If
    anything is raised, so are the statistics.

    A layer that the model keeps in evaluation mode (a frozen backbone) keeps its statistics. Such
    a layer stays in evaluation mode in ``model.train()``, because a class overrides ``train``, or
    is in evaluation mode now while the model is in training mode. If the whole model is in
    evaluation mode, a layer that the training loop froze by hand cannot be told from the others:
    then call this function before ``model.eval()``. A layer with frozen parameters that still
    trains its statistics is recomputed.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    >>> ema_model = EMAModel(model, decay=0.99)
    >>> with ema_model.use_ema():
    ...     recalibrate_batch_norm(model, torch.randn(4, 8, 2))  # four batches
    ...     prediction = model.eval()(torch.ones(1, 2))

    Args:
        model: any module; inside ``use_ema()`` or after ``copy_to(model)`` it has averaged weights.
        batches: what to call it with: a tensor, a tuple or list (its first element, as in
            ``(inputs, labels)``), or a mapping (as keyword arguments).
        device: tensors are moved there first.
        forward: ``forward(model, batch)`` calls the model in place of that.

    Raises:
        ArgumentError: ``batches`` is empty.
        ArgumentTypeError: a batch has another type and ``forward`` is not given.
        ModelError: the model has no BatchNorm layer with running statistics, or keeps all of them
            in evaluation mode.
        StateError: a layer saw at most one value in a channel, which has no variance.
        Exception: any error of an overridden ``model.train()``. Nothing has changed.
    """
    layers = _layers_of(model)
    pools = {name: _Pool() for name in layers}
    with _gathering(model, layers, pools):
        number = 0
        for number, batch in enumerate(batches, start=1):  # noqa: B007  # counts them
            moved = batch if device is None else _move(batch, torch.device(device))
            _call(model, moved) if forward is None else forward(model, moved)
        if not number:
            raise ArgumentError("`batches` must hold at least one batch, got none")
        results = {
            name: pools[name].result(name, layer)
            for name, layer in layers.items()
            if pools[name].seen
        }
    for name, (mean, var) in results.items():
        layer = layers[name]
        layer.running_mean.copy_(mean)  # type: ignore[union-attr]  # a tensor: see above
        layer.running_var.copy_(var)  # type: ignore[union-attr]
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(pools[name].seen)


def _layers_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers whose statistics are recomputed.

    Raises:
        ModelError: the model has no such layer.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor)
    }
    if not layers:
        raise ModelError("`model` must have a BatchNorm layer with running statistics, got none")
    kept = _kept_in_evaluation(model, layers)
    if len(kept) == len(layers):
        raise ModelError(
            "`model` must have a BatchNorm layer that it does not keep in evaluation mode, got"
            f" {listing(kept)}"
        )
    return {name: layer for name, layer in layers.items() if name not in kept}


class _Pool:
    """Count, mean and sum of squared deviations of the values a layer saw; added up in float64.

    Two sets are put together as in Chan, Golub and LeVeque 1983, "Algorithms for Computing the
    Sample Variance", equation 2.1.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        x = args[0].transpose(0, 1).flatten(1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(x, 1, correction=0)
        if x.device.type == "mps":  # which has no float64
            var, mean = var.cpu(), mean.cpu()
        count = mean.new_tensor(float(x.shape[1]), dtype=torch.float64)
        self.seen += 1
        self._parts = [_merge([*self._parts, (count, mean.double(), var.double() * count)])]

    def result(self, name: str, layer: nn.Module) -> tuple[Tensor, Tensor]:
        if isinstance(layer, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
            everyone: list[Any] = [None] * dist.get_world_size(layer.process_group)
            dist.all_gather_object(everyone, self._parts, layer.process_group)
            device = self._parts[0][0].device
            self._parts = [
                tuple(t.to(device) for t in part) for parts in everyone for part in parts
            ]
        count, mean, squares = _merge(self._parts)
        if not count > 1:
            raise StateError(f"`{name}` saw {int(count)} value in a channel, which has no variance")
        return mean, squares / (count - 1)


def _merge(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    count, mean, squares = parts[0]
    for n, m, s in parts[1:]:
        total = count + n
        delta = m - mean
        mean = mean + delta * (n / total)
        squares = squares + s + delta.square() * (count * n / total)
        count = total
    return count, mean, squares


def _kept_in_evaluation(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """The layers that stay in evaluation mode while the model trains.

    Afterwards every module has its mode and every buffer its value from before.
    """
    trains = unwrap(model).training
    kept = {name for name, layer in layers.items() if trains and not layer.training}
    if any(map(_overrides_train, model.modules())):
        with _put_back(model):
            model.train()
            kept |= {name for name, layer in layers.items() if not layer.training}
            if not trains:
                model.eval()
    return [name for name in layers if name in kept]


def _overrides_train(module: nn.Module) -> bool:
    return type(module).train is not nn.Module.train or "train" in vars(module)


@contextmanager
def _gathering(
    model: nn.Module, layers: Mapping[str, _BatchNorm], pools: Mapping[str, _Pool]
) -> Iterator[None]:
    """The layers in training mode, everything else in evaluation mode, and all buffers put back."""
    hooks = []
    with _put_back(model):
        try:
            for module in model.modules():
                module.training = False
            for name, layer in layers.items():
                layer.training = True
                hooks.append(layer.register_forward_pre_hook(pools[name]))
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Restore modes and buffers after the block."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and batch:
        return model(batch[0])
    raise ArgumentTypeError(
        "`batches` must hold tensors, tuples or mappings unless `forward` is given,"
        f" got {type(batch).__name__}"
    )


def _move(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_move(value, device) for value in batch)
    return batch
