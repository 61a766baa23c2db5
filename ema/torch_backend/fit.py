"""Whether the averages of one model fit another one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema.errors import ModelError, difference
from ema.torch_backend.distributed.sharding import local_of, place_of
from ema.torch_backend.selection import Rules, Selection, select

__all__ = ["check_writable", "targets"]


def targets(model: nn.Module, values: Mapping[str, Tensor], ours: Selection) -> dict[str, Tensor]:
    """The tensors of ``model`` that ``values`` can be written to.

    Args:
        model: another model than the averaged one.
        values: by canonical name; of a sharded tensor the part that is here.
        ours: the tensors of the averaged model.

    Raises:
        ModelError: the parameters of the two models, their ties, or the shapes or shards of these
            tensors differ; all differences are listed.
    """
    found = select(model, Rules.of(None, None, "copy"), tracked=values)
    theirs = {**found.averaged, **found.others, **found.buffers}
    live = {**ours.averaged, **ours.others, **ours.buffers}
    unbuilt = {*found.pending, *(name for name, tensor in found.buffers.items() if is_lazy(tensor))}
    available = theirs.keys() - unbuilt
    names = dict.fromkeys([*values, *ours.averaged, *ours.others])
    firsts = {name: found.first_name(name) for name in names}  # a tied tensor has several names
    usable = {name: first for name, first in firsts.items() if first in available}
    takers = {first: name for name, first in reversed(usable.items())}
    parameters = (*found.others, *found.averaged, *found.ties)
    text = difference(
        [name for name in names if takers.get(firsts[name]) != name],
        [name for name in parameters if _is_odd(name, found, ours)],
        [
            phrase
            for name in values
            if name in usable
            for phrase in _mismatch(name, theirs[usable[name]], live[name])
        ],
    )
    if text:
        raise ModelError(f"the average does not fit this model: {text}")
    return {name: theirs[usable[name]] for name in values}


def _is_odd(name: str, theirs: Selection, ours: Selection) -> bool:
    """Whether a name stands for a tensor that our model does not have, or ties to another one."""
    first = ours.first_name(name)
    known = first in ours.averaged or first in ours.others or first in ours.buffers
    return not known or theirs.first_name(first) != theirs.first_name(name)


def check_writable(tensors: Mapping[str, Tensor]) -> None:
    """Make sure that all of these can be written to in place.

    Raises:
        ModelError: one of them cannot.
    """
    for name, tensor in tensors.items():
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ModelError(f"`{name}` was made in inference mode and cannot be written")
        strides = zip(local_of(tensor).stride(), local_of(tensor).shape, strict=True)
        if any(stride == 0 and size > 1 for stride, size in strides):
            raise ModelError(f"`{name}` is expanded: its elements share memory and cannot differ")


def _mismatch(name: str, theirs: Tensor, ours: Tensor) -> list[str]:
    if theirs.shape != ours.shape:
        return [f"`{name}` has shape {tuple(theirs.shape)}, here it is {tuple(ours.shape)}"]
    if place_of(theirs) != place_of(ours):
        return [f"`{name}` is sharded in another way: save() and load() move an average"]
    return []
