"""Whether the averages of one model fit another one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema.errors import ModelError, difference
from ema.torch_backend.distributed.sharding import place_of
from ema.torch_backend.selection import Rules, Selection, select

__all__ = ["targets"]


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
    names = dict.fromkeys([*values, *ours.averaged, *ours.others])
    unbuilt = {*found.pending, *(name for name, tensor in found.buffers.items() if is_lazy(tensor))}
    text = difference(
        [name for name in names if name not in theirs or name in unbuilt],
        [
            name
            for name in (*found.others, *found.averaged, *(found.ties.keys() - ours.ties.keys()))
            if name not in names
        ],
        [
            phrase
            for name in values
            if name in theirs and name not in unbuilt
            for phrase in _mismatch(name, theirs[name], live[name])
        ],
    )
    if text:
        raise ModelError(f"the average does not fit this model: {text}")
    return {name: theirs[name] for name in values}


def _mismatch(name: str, theirs: Tensor, ours: Tensor) -> list[str]:
    if theirs.shape != ours.shape:
        return [f"`{name}` has shape {tuple(theirs.shape)}, here it is {tuple(ours.shape)}"]
    if place_of(theirs) != place_of(ours):
        return [f"`{name}` is sharded in another way: save() and load() move an average"]
    return []
