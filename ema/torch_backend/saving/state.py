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

from ema.checkpoint import Record
from ema.errors import CheckpointError, difference, listing, shown
from ema.schedule_descriptions import describe_schedules
from ema.torch_backend.tensors.memory import in_form_of
from ema.torch_backend.tensors.selection import Selection
from ema.torch_backend.tensors.sharding import box_of, local_of

__all__ = ["STATE_VERSION", "State"]

STATE_VERSION = 1
"""The version of the dict; a file has a version of its own."""

_NEEDED = {
    "step": object,
    "count": object,
    "schedule": Mapping,
    "update_after_step": object,
    "update_every": object,
    "averages": Mapping,
    "not_averaged": list,
}
"""The keys that every state has, and the types of the containers among their values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a run needs to go on as if it had not been interrupted.

    Attributes:
        record: counters, schedule and timing. The schedule of several averages is a mapping from
            their names. A parameter that is neither averaged nor in ``not_averaged`` is missing;
            one in ``not_averaged`` was frozen or excluded.
        averages: name of the average (None for a single one) to canonical name to tensor.
        remainders: of compensated averages, in the same form; empty if there are none.
    """

    record: Record
    averages: Mapping[str | None, Mapping[str, Tensor]]
    remainders: Mapping[str | None, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The state with its version, as one flat dict of plain values and tensors."""
        record = self.record
        optional = {
            "remainders": self.remainders.get(None, self.remainders) or None,
            "skipped": record.skipped,
            "seed": record.seed,
        }
        return {
            "format_version": STATE_VERSION,
            "step": record.step,
            "count": record.count,
            "schedule": describe_schedules(record.schedule, several=None not in self.averages),
            "update_after_step": record.update_after_step,
            "update_every": record.update_every,
            "averages": self.averages.get(None, self.averages),
            "not_averaged": list(record.not_averaged),
            **{name: value for name, value in optional.items() if value is not None},
        }

    @classmethod
    def from_dict(cls, state: object, expected: Sequence[str] = ()) -> State:
        """Check everything that can be checked without the model.

        Args:
            state: what :meth:`to_dict` returned.
            expected: the names of several averages; none for a single one.

        Raises:
            CheckpointError: it is not a state of ours, is of a newer version, or is damaged.
        """
        if not isinstance(state, Mapping):
            raise CheckpointError(f"a state is a dict, got {type(state).__name__}")
        _check_form(state)
        remainders = state.get("remainders", {})
        if not isinstance(remainders, Mapping):
            raise CheckpointError(f"`remainders` must be a mapping, got {shown(remainders)}")
        record = Record(
            step=state["step"],
            count=state["count"],
            schedule=state["schedule"],
            update_after_step=state["update_after_step"],
            update_every=state["update_every"],
            not_averaged=tuple(state["not_averaged"]),
            skipped=state.get("skipped"),
            seed=state.get("seed"),
        )
        return cls.of(record, state["averages"], remainders, expected)

    @classmethod
    def of(
        cls,
        record: Record,
        averages: Mapping[Any, Any],
        remainders: Mapping[Any, Any],
        expected: Sequence[str] = (),
    ) -> State:
        """Check the tensors of a state.

        Args:
            record: the rest of it.
            averages: canonical name to tensor, of several averages by name.
            remainders: in the same form; empty if there are none.
            expected: the names of several averages; none for a single one.

        Raises:
            CheckpointError: these are not the averages, or not tensors.
        """
        checked = _by_name("averages", averages, expected)
        others = set(record.not_averaged)
        if both := [name for name in next(iter(checked.values())) if name in others]:
            raise CheckpointError(f"{listing(both)} are averaged and not averaged")
        rests = {}
        if remainders:
            some = [name for name in expected if name in remainders]
            rests = _by_name("remainders", remainders, some)
        for label, tensors in rests.items():
            ours = checked[label]
            if text := _difference_of(ours, tensors) or "; ".join(_mismatched(tensors, ours)[:10]):
                raise CheckpointError(f"the remainder does not match the average: {text}")
        return cls(record=record, averages=checked, remainders=rests)

    def under_first_names(self, found: Selection) -> State:
        """The same state where each tensor has the name under which ``found`` keeps it.

        A tied parameter, or one of a shared module, may have been saved under another of its names.
        """
        others = tuple(dict.fromkeys(map(found.first_name, self.record.not_averaged)))
        return State(
            record=dataclasses.replace(self.record, not_averaged=others),
            averages={label: _Renamed.of(each, found) for label, each in self.averages.items()},
            remainders={label: _Renamed.of(each, found) for label, each in self.remainders.items()},
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
            known = {*averages, *self.record.not_averaged}
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


def _check_form(state: Mapping[Any, Any]) -> None:
    """Check the keys of a state, its version and its containers."""
    needed = ("format_version", *_NEEDED)
    if absent := [name for name in needed if name not in state]:
        raise CheckpointError(f"this is not a state of an EMAModel: {difference(absent, ())}")
    version = state["format_version"]
    if type(version) is not int or version != STATE_VERSION:
        raise CheckpointError(f"`format_version` must be {STATE_VERSION}, got {shown(version)}")
    for name, kind in _NEEDED.items():
        value = state[name]
        unknown = name == "schedule" and value is None
        if value is None and not unknown:
            raise CheckpointError(f"`{name}` must be given, got None")
        if not unknown and not isinstance(value, kind):
            word = kind.__name__.lower()
            raise CheckpointError(f"`{name}` must be a {word}, got {shown(value)}")
    if odd := [name for name in state["not_averaged"] if not isinstance(name, str)]:
        raise CheckpointError(f"`not_averaged` must hold names, got {shown(odd[0])}")


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
    """The tensors that have another shape or kind in the state than in the model, in words."""
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
