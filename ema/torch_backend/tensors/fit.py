"""Check that the averages of one model fit another model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema.errors import ModelError, difference
from ema.torch_backend.tensors.copying import obstacle
from ema.torch_backend.tensors.selection import Rules, Selection, select
from ema.torch_backend.tensors.sharding import box_of

__all__ = ["check_writable", "targets"]

_NOTHING = Rules(include=(), exclude=(), buffers=())


def targets(model: nn.Module, values: Mapping[str, Tensor], ours: Selection) -> dict[str, Tensor]:
    """The tensors of ``model`` that ``values`` can be written to.

    Args:
        model: another model than the averaged one.
        values: by canonical name; for a sharded tensor the part on this rank. Tensors that ``ours``
            does not average are included only if they are copied too.
        ours: the tensors of the averaged model.

    Raises:
        ModelError: the parameters of the two models, their ties, or the shapes or shards of these
            tensors differ, or one that is not averaged cannot be copied; all differences are
            listed.
    """
    written = [name for name in values if name in ours.averaged]
    found = select(model, _NOTHING, written, into=True)
    theirs = {**found.averaged, **found.others, **found.buffers}
    live = {**ours.averaged, **ours.others, **ours.buffers}
    names = dict.fromkeys([*values, *ours.averaged, *ours.others])
    firsts = {name: found.first_name(name) for name in names}  # a tied tensor has several names
    usable = _usable(firsts, theirs)
    takers = {first: name for name, first in reversed(usable.items())}
    named = {**theirs, **found.tied_tensors()}
    parameters = (*found.others, *found.averaged, *found.ties)
    mismatched: list[str] = []
    for name in values:
        if name in usable:
            mismatched += _mismatch(name, named[name], live[name])
    text = difference(
        [name for name in names if takers.get(firsts[name]) != name],
        [name for name in parameters if _is_odd(name, found, ours)],
        mismatched,
    )
    if text:
        raise ModelError(f"the average does not fit this model: {text}")
    _check_copyable({name: (named[name], live[name]) for name in values if name not in written})
    return {name: named[name] for name in values}


def _check_copyable(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Make sure that tensors that are not averaged can be copied into the other model.

    Args:
        pairs: by name the tensor of the other model and the live one.

    Raises:
        ModelError: lists those that cannot, and why.
    """
    phrases = {name: obstacle(theirs, ours) for name, (theirs, ours) in pairs.items()}
    if odd := [f"`{name}` {phrase}" for name, phrase in phrases.items() if phrase]:
        raise ModelError(
            f"what is not averaged cannot be copied: {difference((), (), odd)};"
            " other.load_state_dict(ema_model.averaged_parameters(), strict=False) writes the"
            " averages alone"
        )


def _usable(firsts: Mapping[str, str], theirs: Mapping[str, Tensor]) -> dict[str, str]:
    """The names whose first name stands for a tensor with memory in the other model."""
    return {
        name: first
        for name, first in firsts.items()
        if first in theirs and not is_lazy(theirs[first])
    }


def _is_odd(name: str, theirs: Selection, ours: Selection) -> bool:
    """Whether a name stands for a tensor that our model does not have, or ties to another one."""
    first = ours.first_name(name)
    known = first in ours.averaged or first in ours.others or first in ours.buffers
    return not known or theirs.first_name(first) != theirs.first_name(name)


def check_writable(tensors: Mapping[str, Tensor]) -> None:
    """Make sure that these tensors, which :func:`targets` has found, can be written in place.

    Raises:
        ModelError: one of them was made in inference mode.
    """
    for name, tensor in tensors.items():
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise ModelError(f"`{name}` was made in inference mode and cannot be written")


def _mismatch(name: str, theirs: Tensor, ours: Tensor) -> list[str]:
    if theirs.shape != ours.shape:
        return [f"`{name}` has shape {tuple(theirs.shape)}, here it is {tuple(ours.shape)}"]
    if box_of(theirs) != box_of(ours):
        return [f"`{name}` is sharded in another way: save() and load() move an average"]
    return []
