"""The state of an average as plain containers, and its validation.

A state holds tensors, numbers, strings, lists and dicts only, so ``torch.load`` reads it with
``weights_only=True``, its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from ema.errors import CheckpointError, difference, listing
from ema.torch_backend.selection import Selection

__all__ = ["FORMAT_VERSION", "State"]

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What a run needs to go on as if it had not been interrupted.

    Attributes:
        step: calls of ``update``.
        count: averages made by them.
        schedule: class and fields, see :meth:`ema.Schedule.to_dict`; of several averages by name.
        update_after_step: as given to the constructor.
        update_every: likewise.
        averages: name of the average (None for a single one) to canonical name to tensor.
        not_averaged: names of the model's other parameters. A parameter that stands in neither
            is missing; one that stands here was frozen or excluded.
    """

    step: int
    count: int
    schedule: dict[str, Any]
    update_after_step: int
    update_every: int
    averages: Mapping[str | None, Mapping[str, Tensor]]
    not_averaged: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The state with its version, as one flat dict."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["averages"] = self.averages.get(None, self.averages)
        return {"format_version": FORMAT_VERSION, **fields}

    @classmethod
    def from_dict(cls, state: object, expected: Sequence[str] = ()) -> State:
        """Check everything that can be checked without the model.

        Args:
            state: what :meth:`to_dict` returned.
            expected: the names of several averages; none for a single one.

        Raises:
            CheckpointError: this is no state of ours, of a newer version, or damaged.
        """
        if not isinstance(state, Mapping):
            raise CheckpointError(f"a state is a dict, got {type(state).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        absent = [name for name in ("format_version", *names) if name not in state]
        if absent:
            raise CheckpointError(f"this is no state of an EMAModel: {difference(absent, ())}")
        if state["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"`format_version` must be {FORMAT_VERSION}, got {state['format_version']!r}"
            )
        self = cls(**{name: state[name] for name in names})
        for name, minimum in (
            ("step", 0),
            ("count", 0),
            ("update_after_step", 0),
            ("update_every", 1),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < minimum:
                raise CheckpointError(f"`{name}` must be an integer >= {minimum}, got {value!r}")
        if self.count > self.step:
            raise CheckpointError(f"`count` must not exceed `step` ({self.step}), got {self.count}")
        for name, kind in (("averages", Mapping), ("schedule", Mapping), ("not_averaged", list)):
            if not isinstance(getattr(self, name), kind):
                raise CheckpointError(
                    f"`{name}` must be a {kind.__name__.lower()}, got {getattr(self, name)!r:.80}"
                )
        return dataclasses.replace(self, averages=_by_name(state["averages"], expected))

    def check_fits(self, found: Selection) -> None:
        """Compare with the tensors of a model.

        Raises:
            CheckpointError: lists all that is missing, unexpected, or of another shape or kind.
        """
        live = {**found.averaged, **found.others, **found.buffers}
        for name in found.pending:
            live.pop(name, None)
        parameters = (*found.averaged, *found.others)
        for label, averages in self.averages.items():
            known = {*averages, *self.not_averaged}
            text = difference(
                [name for name in parameters if name not in known],
                [name for name in averages if name not in live],
                _mismatched(averages, live),
            )
            if text:
                which = "" if label is None else f" in the average {label!r}"
                raise CheckpointError(f"the state belongs to another model:{which} {text}")


def _by_name(averages: Mapping[Any, Any], expected: Sequence[str]) -> dict[Any, Any]:
    """The averages by their names, each a mapping from canonical names to tensors."""
    several = {None: averages} if not expected else averages
    if expected and (text := _difference_of(expected, averages)):
        raise CheckpointError(f"the state holds other averages: {text}")
    for label, tensors in several.items():
        where = "averages" if label is None else f"averages[{label!r}]"
        if not isinstance(tensors, Mapping):
            raise CheckpointError(f"`{where}` must be a mapping, got {tensors!r:.80}")
        for name, value in tensors.items():
            if isinstance(value, Mapping):
                raise CheckpointError(
                    f"the state holds several averages, {listing(map(str, averages))}: it is for"
                    " an EMAModel with the same names"
                )
            if not isinstance(value, Tensor):
                raise CheckpointError(f"`{where}[{name!r}]` must be a tensor, got {value!r:.80}")
    first = next(iter(several.values()))
    for tensors in several.values():
        if text := _difference_of(first, tensors):
            raise CheckpointError(f"the averages are not of the same tensors: {text}")
    return dict(several)


def _difference_of(ours: Collection[str], theirs: Collection[str]) -> str:
    return difference(
        [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
    )


def _mismatched(averages: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> list[str]:
    """What has another shape or kind in the state than in the model, in words."""
    phrases = []
    for name, average in averages.items():
        tensor = live.get(name, average)
        if average.shape != tensor.shape:
            phrases.append(
                f"`{name}` has shape {tuple(tensor.shape)}, the state has {tuple(average.shape)}"
            )
        elif _kind(average) != _kind(tensor) or _kind(average) == "integer":
            phrases.append(f"`{name}` has dtype {tensor.dtype}, the state has {average.dtype}")
    return phrases


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "integer"
