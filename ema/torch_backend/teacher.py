"""Call a model with other tensors than its own, and leave its own alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ema.errors import ModelError
from ema.torch_backend.distributed.sharding import fully_sharded, wrapped_like
from ema.torch_backend.names import unwrap
from ema.torch_backend.selection import Selection

__all__ = ["call_with"]


def call_with(
    model: nn.Module,
    selection: Selection,
    averages: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The output of the bare model (no DDP, not compiled) with its averaged tensors replaced.

    Averages are cast to the dtypes of the tensors that they stand for. Everything else is
    detached, so no gradient reaches the live parameters, and buffers are copies, so that
    the statistics of a BatchNorm in training mode stay as they are.

    Raises:
        ModelError: ``fully_shard`` was called on it, which gathers what it knows of and nothing else.
    """
    if fully_sharded(selection.modules):
        raise ModelError(
            "under fully_shard a model can only be called with its own parameters: call it inside"
            " use_ema()"
        )
    live = selection.averaged
    tensors = {
        **{
            name: wrapped_like(average.to(live[name].device, live[name].dtype), live[name])
            for name, average in averages.items()
        },
        **{name: tensor.detach() for name, tensor in selection.others.items()},
        **{name: tensor.clone() for name, tensor in selection.buffers.items()},
    }
    originals = {**live, **selection.others, **selection.buffers}
    for name, (first, tied) in selection.ties.items():
        original = originals[first]
        same = tied.shape == original.shape and tied.stride() == original.stride()
        tensors[name] = (
            tensors[first] if same else tensors[first].as_strided(tied.shape, tied.stride())
        )
    inner = unwrap(model)
    skip = len(next(path for path in _prefix(model, inner)))
    by_path = {selection.paths[name][skip:]: tensor for name, tensor in tensors.items()}
    # each name is given: left to functional_call, ties come back wrong where a module is shared
    return functional_call(inner, by_path, args, kwargs, tie_weights=False)


def _prefix(model: nn.Module, inner: nn.Module) -> list[str]:
    return [f"{path}." if path else "" for path, module in model.named_modules() if module is inner]
