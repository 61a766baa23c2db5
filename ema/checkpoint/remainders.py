"""Keep the remainders of compensated averages in one file with the averages."""

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
    """Combine averages and remainders into the tensors of one file, with the ``parts`` of its record.

    Args:
        averages: the averages, by canonical name.
        remainders: the remainders of all averages, by canonical name; or nothing.

    Raises:
        CheckpointError: an average already has the name of a remainder.
    """
    parts = {f"{_REMAINDER}/{name}": ("", _REMAINDER, name) for name in remainders}
    if taken := [key for key in parts if key in averages]:
        raise CheckpointError(
            f"`{shortened(taken[0])}` is also the name of the remainder of"
            f" `{shortened(parts[taken[0]][2])}` in the file: give the parameter another name"
        )
    keyed = {f"{_REMAINDER}/{name}": tensor for name, tensor in remainders.items()}
    return {**averages, **keyed}, parts


def separated(stored: StoredState) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Separate the tensors of a file into averages and remainders, by canonical name.

    Raises:
        CheckpointError: the file holds tensors of another kind, or the remainders do not match the averages.
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
            raise CheckpointError(f"the remainders do not match the averages: {text}")
    return averages, remainders
