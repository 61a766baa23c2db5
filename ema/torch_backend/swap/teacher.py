"""Call a model with averaged weights in place of its own, which stay unchanged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from ema.errors import ModelError, listing
from ema.torch_backend.swap.caches import parametrizations_put_aside
from ema.torch_backend.swap.traces import attributes_put_back
from ema.torch_backend.tensors.names import named_tensors, unwrap
from ema.torch_backend.tensors.selection import Selection
from ema.torch_backend.tensors.sharding import fully_sharded, wrapped_like

__all__ = ["call_with", "current_buffers", "with_current_buffers"]


def call_with(
    model: nn.Module,
    selection: Selection,
    averages: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The output of the bare model (no DDP, not compiled) with its averaged tensors replaced.

    Averages are cast to the dtypes of the tensors that they stand for. Everything else is
    detached, so no gradient reaches the live parameters. Tensors that a forward pass writes in
    place are copies: buffers, averaged or not, such as the statistics of a BatchNorm in training mode, and the
    weights of an embedding with ``max_norm``. Attributes that ``forward`` assigns get their former
    values back.

    Raises:
        ModelError: ``fully_shard`` was called on it, which gathers only its own parameters; a lazy
            module has not been run yet; or the model is a scripted one.
    """
    _check_callable(model, selection)
    live = selection.averaged
    buffers = current_buffers(model, selection)
    written = _renormalized(selection.modules)

    def lent(tensor: Tensor, original: Tensor) -> Tensor:
        """The tensor that stands for ``original``: ``tensor``, or a copy if it may be written."""
        is_written = id(original) in written or not isinstance(original, nn.Parameter)
        return tensor.clone() if is_written else tensor

    tensors = {
        **{
            name: wrapped_like(
                lent(average.to(live[name].device, live[name].dtype), live[name]), live[name]
            )
            for name, average in averages.items()
        },
        **{name: lent(_without_gradient(t), t) for name, t in selection.others.items()},
        **{name: tensor.clone() for name, tensor in buffers.items()},
    }
    inner = unwrap(model)
    skip = len(next(path for path in _prefix(model, inner)))
    paths = {name: path[skip:] for name, path in selection.paths.items()}
    tensors |= _ties(inner, selection, paths, {**live, **selection.others, **buffers}, tensors)
    by_path = {paths[name]: tensor for name, tensor in tensors.items()}
    with attributes_put_back(selection.modules), parametrizations_put_aside():
        # each place is given: left to functional_call, ties come back wrong where a module is shared
        return functional_call(inner, by_path, args, kwargs, tie_weights=False)


def _check_callable(model: nn.Module, selection: Selection) -> None:
    """Make sure that the model can be called with other tensors than its own.

    Raises:
        ModelError: it cannot.
    """
    if isinstance(unwrap(model), torch.jit.ScriptModule):
        raise ModelError(
            "a scripted or traced model can only be called with its own parameters: call it inside"
            " use_ema(), or call averaged_module()"
        )
    if fully_sharded(selection.modules):
        raise ModelError(
            "under fully_shard a model can only be called with its own parameters: call it inside"
            " use_ema()"
        )
    if lazy := [name for name, tensor in selection.others.items() if is_lazy(tensor)]:
        raise ModelError(
            f"a lazy model can be called after its own first forward pass, got no shape of"
            f" {listing(lazy)} yet"
        )


def _ties(
    inner: nn.Module,
    selection: Selection,
    paths: Mapping[str, str],
    originals: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The tensors that stand for tied ones, by each name that is not another name of a shared module."""
    tied_tensors = {}
    holders = {_holder(inner, paths[first]) for first, _ in selection.ties.values()}
    for name, (first, tied) in selection.ties.items():
        if (holder := _holder(inner, paths[name])) in holders:
            continue
        holders.add(holder)
        original, tensor = originals[first], tensors[first]
        if tied.shape != original.shape or tied.stride() != original.stride():
            tensor = tensor.as_strided(tied.shape, tied.stride())
        tied_tensors[name] = tensor
    return tied_tensors


def current_buffers(model: nn.Module, selection: Selection) -> dict[str, Tensor]:
    """The buffers that are not averaged, as the modules hold them now.

    ``forward`` may have assigned others since the selection was made: ``self.count = self.count + 1``.
    """
    now = named_tensors(model).buffers
    return {name: now.get(name, tensor) for name, tensor in selection.buffers.items()}


def with_current_buffers(model: nn.Module, selection: Selection) -> Selection:
    """The same tensors, and the buffers among them as the modules hold them now.

    While averages are in a model nothing is selected in it anew, and a cast puts other buffers into
    its modules.
    """
    now = named_tensors(model).buffers
    ties = selection.ties.items()
    return dataclasses.replace(
        selection,
        averaged={name: now.get(name, tensor) for name, tensor in selection.averaged.items()},
        buffers={name: now.get(name, tensor) for name, tensor in selection.buffers.items()},
        ties={name: (first, now.get(name, tensor)) for name, (first, tensor) in ties},
    )


def _renormalized(modules: Iterable[nn.Module]) -> set[int]:
    """Ids of the weights that a forward pass shortens to ``max_norm``, in place."""
    return {
        id(module.weight)
        for module in modules
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    }


def _without_gradient(tensor: Tensor) -> Tensor:
    """A frozen parameter itself: it may be of a class that ``detach`` loses (bitsandbytes)."""
    return tensor.detach() if tensor.requires_grad else tensor


def _holder(model: nn.Module, path: str) -> tuple[int, str]:
    """The module that has the tensor at the end of a path, and the name that it has there."""
    prefix, _, key = path.rpartition(".")
    return id(model.get_submodule(prefix)), key


def _prefix(model: nn.Module, inner: nn.Module) -> list[str]:
    return [f"{path}." if path else "" for path, module in model.named_modules() if module is inner]
