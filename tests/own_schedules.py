"""Schedules of a user's own, of every kind of class and field, for the tests of both backends."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import ema


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(ema.Schedule):
    """Ignores everything that it is asked."""

    decay: float

    def weight(self, count, span=1, xp=None):
        return 1 - self.decay


@dataclasses.dataclass(frozen=True)
class Warmup(ema.Schedule):
    """An expression of ``xp``, which works on floats, arrays and traced values."""

    decay: float
    updates: float

    def weight(self, count, span=1, xp=None):
        return xp.maximum(1 - self.decay, xp.exp(-count / self.updates))


@dataclasses.dataclass  # not frozen: it has no hash
class Table(ema.Schedule):
    """Python floats only; the table may be of any kind, and the last decay stays."""

    decays: Any

    def weight(self, count, span=1, xp=None):
        return 1 - self.decays[min(int(count), len(self.decays)) - 1]


class Attributes(ema.Schedule):
    """No dataclass; private attributes and what it computes do not describe it."""

    def __init__(self, low, high):
        self.low = low
        self.high = high
        self._asked = 0

    @functools.cached_property
    def middle(self):
        return (self.low + self.high) / 2

    def weight(self, count, span=1, xp=None):
        self._asked += 1
        return 1 - (self.low if count < 3 else self.middle)


class Slots(ema.Schedule):
    """Attributes in ``__slots__``, and a ``weight`` with fewer arguments."""

    __slots__ = ("decay",)

    def __init__(self, decay):
        self.decay = decay

    def weight(self, count):
        return 1 - self.decay


@dataclasses.dataclass(frozen=True)
class Limits:
    """A part of :class:`Nested`, no schedule."""

    low: float = -math.inf
    high: float = math.inf


@dataclasses.dataclass(frozen=True)
class Nested(ema.Schedule):
    """A schedule around another one, in a field whose name is that of the class in a description."""

    schedule: ema.Schedule
    limits: Limits = dataclasses.field(default_factory=Limits)
    table: dict[int, tuple[float, ...]] = dataclasses.field(default_factory=lambda: {1: (0.5, 1)})

    def weight(self, count, span=1, xp=None):
        return self.schedule.weight(count, span, xp)


@dataclasses.dataclass(frozen=True)
class Applied(ema.Schedule):
    """A function of the user's in a field."""

    function: Callable[[float], float]

    def weight(self, count, span=1, xp=None):
        return 1 - self.function(count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLife(ema.Schedule):
    """Has the name of a schedule of ours, and other fields."""

    updates: float

    def weight(self, count, *, span=1, xp=None):
        return 1 - 0.5 ** (1 / self.updates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLifeRampup(ema.Schedule):
    """Has the name of a schedule of ours, and some of its fields."""

    steps: float

    def weight(self, count, span=1, **_):
        return 1 - 0.5 ** (span / self.steps)


class Kind(enum.Enum):
    """A value that JSON does not have."""

    SLOW = 1


@dataclasses.dataclass(frozen=True)
class Answers(ema.Schedule):
    """Answers what it is told to at update ``at``, and 0.5 before and after."""

    answer: Any
    at: int = 1

    def weight(self, count, span=1, xp=None):
        return self.answer if count == self.at else 0.5


def decay(count):
    """For :class:`Applied`: a function that can be pickled."""
    return 0.5 if count < 4 else 0.75


# each with its description in a state or a file
DESCRIBED = {
    "constant": (Constant(decay=0.5), {"schedule": "Constant", "decay": 0.5}),
    "warmup": (Warmup(0.9, 3), {"schedule": "Warmup", "decay": 0.9, "updates": 3}),
    "tuple": (Table((0.5, 0.75)), {"schedule": "Table", "decays": [0.5, 0.75]}),
    "list": (Table([0.5, 0.75]), {"schedule": "Table", "decays": [0.5, 0.75]}),
    "NumPy scalars": (
        Table((np.float32(0.5), np.float64(0.75), np.int64(1), np.bool_(False))),
        {"schedule": "Table", "decays": [0.5, 0.75, 1, False]},
    ),
    "attributes": (Attributes(0.25, 0.75), {"schedule": "Attributes", "low": 0.25, "high": 0.75}),
    "slots": (Slots(0.5), {"schedule": "Slots", "decay": 0.5}),
    "nested": (
        Nested(Constant(decay=0.5)),
        {
            "schedule": "Nested",
            "schedule_": {"schedule": "Constant", "decay": 0.5},
            "limits": {"low": "-inf", "high": "inf"},
            "table": {"1": [0.5, 1]},
        },
    ),
    "our name": (HalfLife(updates=1), {"schedule": "HalfLife", "updates": 1}),
    "our name and fields": (
        HalfLifeRampup(steps=5.0),
        {"schedule": "HalfLifeRampup", "steps": 5.0},
    ),
}
DESCRIBED["NaN"] = (
    dataclasses.replace(DESCRIBED["nested"][0], limits=Limits(math.nan)),
    {**DESCRIBED["nested"][1], "limits": {"low": "nan", "high": "inf"}},
)

UNDESCRIBED = {
    "function": Applied(decay),
    "array": Table(np.array([0.5, 0.75])),
    "other values": Nested(Constant(decay=0.5), table={"kind": Kind.SLOW}),
    "bytes": Nested(Constant(decay=0.5), table={"bytes": b"1"}),
    "keys that become one": Nested(Constant(decay=0.5), table={1: 1, "1": 2}),
    "no Unicode": Nested(Constant(decay=0.5), table={"\ud800": 2}),
    "an endless number": Nested(Constant(decay=0.5), table={"digits": 10**5000}),
    "a long table": Table((0.123456789,) * 10_000),
}
endless: list[Any] = []
endless.append(endless)
UNDESCRIBED["endless"] = Nested(Constant(decay=0.5), table={"self": endless})

ALL = {**{name: schedule for name, (schedule, _) in DESCRIBED.items()}, **UNDESCRIBED}

WRONG = {
    "above 1": (1.5, "must lie in [0, 1], got 1.5"),
    "below 0": (-0.25, "must lie in [0, 1], got -0.25"),
    "NaN": (math.nan, "must lie in [0, 1], got nan"),
    "infinite": (np.float32(math.inf), "must lie in [0, 1], got inf"),
    "nothing": (None, "must be a number, got None"),
    "an array": (np.full(1, 0.5), "must be a number, got array([0.5])"),
    "complex": (0.5j, "must be a number, got 0.5j"),
    "text": ("0.5", "must be a number, got '0.5'"),
}
