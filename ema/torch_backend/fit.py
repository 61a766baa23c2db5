"""Whether the averages of one model fit another one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ema.errors import ModelError, difference
from ema.torch_backend.selection import Rules, Selection, select

__all__ = ["targets"]


def targets(model: nn.Module, values: Mapping[str, Tensor], ours: Selection) -> dict[str, Tensor]:
    """The tensors of ``model`` that ``values`` can be written to.

    Args:
        model: another model than the averaged one.
        values: by canonical name.
        ours: the tensors of the averaged model.

    Raises:
        ModelError: the parameters of the two models, their ties or the shapes of these tensors
            differ; all differences are listed.
    """
    found = select(model, Rules.of(None, None, "copy"), tracked=values)
    theirs = {**found.averaged, **found.others, **found.buffers}
    names = {*values, *ours.averaged, *ours.others}
    text = difference(
        [name for name in names if name not in theirs or name in found.pending],
        [
            name
            for name in (*found.others, *found.averaged, *(found.ties.keys() - ours.ties.keys()))
            if name not in names
        ],
        [
            f"`{name}` has shape {tuple(theirs[name].shape)}, here it is {tuple(value.shape)}"
            for name, value in values.items()
            if name in theirs and name not in found.pending and theirs[name].shape != value.shape
        ],
    )
    if text:
        raise ModelError(f"the average does not fit this model: {text}")
    return {name: theirs[name] for name in values}
