"""The state of an average as plain containers, and its validation.

A state holds tensors, numbers, strings, lists and dicts only, so ``torch.load`` reads it with
``weights_only=True``, its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ema.errors import CheckpointError, difference
from ema.torch_backend.selection import Selection

__all__ = ["FORMAT_VERSION", "State"]

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What a run needs to go on as if it had not been interrupted.

    Attributes:
        step: calls of ``update``.
        count: averages made by them.
        schedule: class and fields, see :meth:`ema.Schedule.to_dict`.
        update_after_step: as given to the constructor.
        update_every: likewise.
        averages: canonical name to tensor.
        not_averaged: names of the model's other parameters. A parameter that stands in neither
            is missing; one that stands here was frozen or excluded.
    """

    step: int
    count: int
    schedule: dict[str, Any]
    update_after_step: int
    update_every: int
    averages: dict[str, Tensor]
    not_averaged: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The state with its version, as one flat dict."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"format_version": FORMAT_VERSION, **fields}

    @classmethod
    def from_dict(cls, state: object) -> State:
        """Check everything that can be checked without the model.

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
        for name, value in self.averages.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"`averages[{name!r}]` must be a tensor, got {value!r:.80}")
        return self

    def check_fits(self, found: Selection) -> None:
        """Compare with the tensors of a model.

        Raises:
            CheckpointError: lists all that is missing, unexpected, or of another shape or kind.
        """
        live = {**found.averaged, **found.others, **found.buffers}
        for name in found.pending:
            live.pop(name, None)
        mismatched = []
        for name, average in self.averages.items():
            tensor = live.get(name, average)
            if average.shape != tensor.shape:
                mismatched.append(
                    f"`{name}` has shape {tuple(tensor.shape)},"
                    f" the state has {tuple(average.shape)}"
                )
            elif _kind(average) != _kind(tensor) or _kind(average) == "integer":
                mismatched.append(
                    f"`{name}` has dtype {tensor.dtype}, the state has {average.dtype}"
                )
        known = {*self.averages, *self.not_averaged}
        missing = [name for name in (*found.averaged, *found.others) if name not in known]
        unexpected = [name for name in self.averages if name not in live]
        if text := difference(missing, unexpected, mismatched):
            raise CheckpointError(f"the state belongs to another model: {text}")


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "integer"
