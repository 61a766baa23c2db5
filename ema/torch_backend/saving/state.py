"""The state of an average as plain containers, and its validation.

A state holds tensors, numbers, strings, lists and dicts only, so ``torch.load`` reads it with
``weights_only=True``, its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, strided

from ema.errors import CheckpointError, difference, listing, shown
from ema.torch_backend.tensors.memory import in_form_of
from ema.torch_backend.tensors.selection import Selection
from ema.torch_backend.tensors.sharding import box_of, local_of

__all__ = ["STATE_VERSION", "State"]

STATE_VERSION = 1

_OPTIONAL = ("remainders", "skipped", "seed")
"""What only some averages have; a state without them is as good."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """What a run needs to go on as if it had not been interrupted.

    Attributes:
        step: calls of ``update``.
        count: averages made by them.
        schedule: class and fields, see :meth:`ema.Schedule.to_dict`, or None where these are not
            plain values; of several averages by name.
        update_after_step: as given to the constructor.
        update_every: likewise.
        averages: name of the average (None for a single one) to canonical name to tensor.
        not_averaged: names of the model's other parameters. A parameter that stands in neither
            is missing; one that stands here was frozen or excluded.
        remainders: of compensated averages, as ``averages``; absent where there are none.
        skipped: updates that were due and not made, since the live weights were not finite;
            absent where nobody looked.
        seed: of stochastic rounding; absent where nothing is rounded so.
    """

    step: int
    count: int
    schedule: Mapping[str, Any] | None
    update_after_step: int
    update_every: int
    averages: Mapping[str | None, Mapping[str, Tensor]]
    not_averaged: list[str]
    remainders: Mapping[str | None, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    skipped: int | None = None
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The state with its version, as one flat dict."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("averages", "remainders"):
            fields[name] = fields[name].get(None, fields[name])
        absent = [name for name in _OPTIONAL if fields[name] is None or fields[name] == {}]
        return {
            "format_version": STATE_VERSION,
            **{name: value for name, value in fields.items() if name not in absent},
        }

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
        needed = [name for name in ("format_version", *names) if name not in _OPTIONAL]
        absent = [name for name in needed if name not in state]
        if absent:
            raise CheckpointError(f"this is no state of an EMAModel: {difference(absent, ())}")
        version = state["format_version"]
        if type(version) is not int or version != STATE_VERSION:
            raise CheckpointError(f"`format_version` must be {STATE_VERSION}, got {shown(version)}")
        self = cls(**{name: state[name] for name in names if name in state})
        self._check_numbers()
        for name, kind in (
            ("averages", Mapping),
            ("remainders", Mapping),
            ("schedule", Mapping),
            ("not_averaged", list),
        ):
            unknown = name == "schedule" and self.schedule is None
            if not unknown and not isinstance(getattr(self, name), kind):
                raise CheckpointError(
                    f"`{name}` must be a {kind.__name__.lower()}, got {shown(getattr(self, name))}"
                )
        if odd := [name for name in self.not_averaged if not isinstance(name, str)]:
            raise CheckpointError(f"`not_averaged` must hold names, got {shown(odd[0])}")
        averages = _by_name("averages", self.averages, expected)
        others = set(self.not_averaged)
        if both := [name for name in next(iter(averages.values())) if name in others]:
            raise CheckpointError(f"{listing(both)} are averaged and not averaged")
        remainders = {}
        if self.remainders:
            some = [name for name in expected if name in self.remainders]
            remainders = _by_name("remainders", self.remainders, some)
        for label, tensors in remainders.items():
            ours = averages[label]
            if text := _difference_of(ours, tensors) or "; ".join(_mismatched(tensors, ours)[:10]):
                raise CheckpointError(f"the remainders are not those of the averages: {text}")
        return dataclasses.replace(self, averages=averages, remainders=remainders)

    def _check_numbers(self) -> None:
        for name, minimum, bits in (
            ("step", 0, 63),
            ("count", 0, 63),
            ("update_after_step", 0, 63),
            ("update_every", 1, 63),
            ("skipped", 0, 63),
            ("seed", 0, 64),
        ):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if type(value) is not int or not minimum <= value < 1 << bits:
                raise CheckpointError(
                    f"`{name}` must be an integer in [{minimum}, 2**{bits}), got {shown(value)}"
                )
        if self.count > self.step:
            raise CheckpointError(f"`count` must not exceed `step` ({self.step}), got {self.count}")

    def under_first_names(self, found: Selection) -> State:
        """The same state where each tensor has the name under which ``found`` keeps it.

        A tied parameter, or one of a shared module, may have been saved under another of its names.
        """
        return dataclasses.replace(
            self,
            averages={label: _Renamed.of(each, found) for label, each in self.averages.items()},
            remainders={label: _Renamed.of(each, found) for label, each in self.remainders.items()},
            not_averaged=list(dict.fromkeys(map(found.first_name, self.not_averaged))),
        )

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

    def unlike(self, found: Selection) -> list[str]:
        """Names of the averages that do not equal the tensors of a model, which they fit."""
        live = {**found.averaged, **found.others, **found.buffers}
        averages = [pair for several in self.averages.values() for pair in several.items()]
        names = (name for name, average in averages if not _equal(average, live[name]))
        return list(dict.fromkeys(names))


class _Renamed(Mapping[str, Tensor]):
    """Tensors under other names. They are read from ``tensors`` when asked for, maybe from a file.

    A tensor that is tied to the view of another one (``weight.t()``) gets the form of that one.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], old_names: Mapping[str, str], found: Selection
    ) -> None:
        self._tensors = tensors
        self._old_names = old_names
        self._found = found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], found: Selection) -> _Renamed:
        """Under first names, unless these are taken: two tensors are not made one."""
        firsts = {name: found.first_name(name) for name in tensors}
        return cls(
            tensors,
            {name if first in tensors else first: name for name, first in firsts.items()},
            found,
        )

    def __getitem__(self, name: str) -> Tensor:
        old = self._old_names[name]
        value = self._tensors[old]
        if name == old:
            return value
        live, tied = self._found.tied_to(old)
        return in_form_of(live, tied, value) if value.shape == tied.shape else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._old_names)

    def __len__(self) -> int:
        return len(self._old_names)

    def __contains__(self, name: object) -> bool:
        return name in self._old_names  # Mapping's own would read the tensor


def _by_name(
    what: str, averages: Mapping[Any, Any], expected: Sequence[str]
) -> dict[Any, dict[str, Tensor]]:
    """The averages by their names, each a mapping from canonical names to tensors."""
    several = {None: averages} if not expected else averages
    if expected and (text := _difference_of(expected, averages)):
        raise CheckpointError(f"the state holds other averages: {text}")
    for label, tensors in several.items():
        where = what if label is None else f"{what}[{label!r}]"
        if not isinstance(tensors, Mapping):
            raise CheckpointError(f"`{where}` must be a mapping, got {shown(tensors)}")
        for name, value in tensors.items():
            if not isinstance(name, str):
                raise CheckpointError(f"`{where}` must hold names, got {shown(name)}")
            if isinstance(value, Mapping):
                raise CheckpointError(
                    f"the state holds several averages, {listing(map(str, averages))}: it is for"
                    " an EMAModel with the same names"
                )
            if not isinstance(value, Tensor):
                raise CheckpointError(f"`{where}[{name!r}]` must be a tensor, got {shown(value)}")
            if value.is_meta or value.layout != strided:
                raise CheckpointError(
                    f"`{where}[{name!r}]` must be a dense tensor with values, got {value.layout} on"
                    f" {value.device}"
                )
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
        elif not box_of(average).covers(box_of(tensor)):
            phrases.append(
                f"`{name}` is sharded in another way: torch.distributed.checkpoint and save() move"
                " an average"
            )
    return phrases


def _equal(average: Tensor, live: Tensor) -> bool:
    part = box_of(average).part(local_of(average), box_of(live))
    return torch.equal(part, local_of(live).detach().to(part))


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "integer"
