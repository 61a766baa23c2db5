"""Remainders of compensated averages, which a file holds beside the averages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ema.checkpoint.reader import StoredState, StoredTensor
from ema.errors import CheckpointError, difference, shortened, shown

__all__ = ["joined", "separated"]

_REMAINDER = "remainder"

_Tensor = TypeVar("_Tensor")


def joined(
    averages: Mapping[str, _Tensor], remainders: Mapping[str, _Tensor]
) -> tuple[dict[str, _Tensor], dict[str, tuple[str, str, str]]]:
    """All tensors of a file by their keys, and the ``parts`` of its record.

    Args:
        averages: by canonical name.
        remainders: likewise, of all of them or of none.

    Raises:
        CheckpointError: an average has the name that a remainder is to have.
    """
    parts = {f"{_REMAINDER}/{name}": ("", _REMAINDER, name) for name in remainders}
    if taken := [key for key in parts if key in averages]:
        raise CheckpointError(
            f"`{shortened(taken[0])}` is what the remainder of `{shortened(parts[taken[0]][2])}` is"
            " called in the file: give the parameter another name"
        )
    keyed = {f"{_REMAINDER}/{name}": tensor for name, tensor in remainders.items()}
    return {**averages, **keyed}, parts


def separated(stored: StoredState) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The averages of a file and their remainders, by canonical name.

    Raises:
        CheckpointError: it holds something else, or remainders that are not those of the averages.
    """
    averages = dict(stored.tensors)
    remainders: dict[str, StoredTensor] = {}
    for key, (label, part, name) in stored.record.parts.items():
        if label or part != _REMAINDER:
            raise CheckpointError(
                f"`{shortened(key)}` is the {shortened(part)} of {shown(label)}, which this version"
                " cannot read"
            )
        if key not in averages or name in remainders:
            raise CheckpointError(f"`parts` must name each remainder once, got {key!r:.80}")
        remainders[name] = averages.pop(key)
    if remainders:
        mismatched = [
            f"`{shortened(name)}` is {average.dtype} {average.shape}, its remainder"
            f" {remainders[name].dtype} {remainders[name].shape}"
            for name, average in averages.items()
            if name in remainders
            and (average.dtype, average.shape) != (remainders[name].dtype, remainders[name].shape)
        ]
        missing = [name for name in averages if name not in remainders]
        unexpected = [name for name in remainders if name not in averages]
        if text := difference(missing, unexpected, mismatched):
            raise CheckpointError(f"the remainders are not those of the averages: {text}")
    return averages, remainders
