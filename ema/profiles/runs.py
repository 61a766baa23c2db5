"""Profiles of real averages: any schedule, one update after the other.

An update with weight ``w_m`` keeps the share ``1 − w_m`` of the average. At update ``n`` the average
contains the share ``exp(L_n − L_m)`` of its value after update ``m``, where
``L_m = Σ_{l≤m} ln(1 − w_l)``. One such table, made in O(T), serves every step of a run. The power
function and constant decays have a formula and need no table.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import final

import numpy as np

from ema import validate
from ema.errors import ArgumentError
from ema.profiles.profile import Floats
from ema.schedules import (
    ConstantDecay,
    HalfLife,
    PowerFunction,
    Schedule,
    UniformAverage,
    as_schedule,
)
from ema.weights import weight_of, weights_of

__all__ = ["Run", "RunProfile", "profile_of"]


@final
@dataclasses.dataclass(frozen=True)
class Run:
    """A schedule in a run of ``steps`` steps, with the timing options of ``EMAModel``.

    Args:
        schedule: a decay per update in [0, 1], or a schedule, of this library or your own.
        steps: length of the run, at least 1.
        update_every: steps from one update to the next, at least 1.
        update_after_step: the average equals the params up to this step, at least 0.

    Raises:
        ArgumentError: an argument is out of range; later, where a schedule of your own gives a
            weight outside [0, 1] or NaN.
        ArgumentTypeError: an argument has the wrong type.
    """

    schedule: Schedule
    steps: int
    _: dataclasses.KW_ONLY
    update_every: int = 1
    update_after_step: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", as_schedule(self.schedule, "schedule"))
        for name, minimum in (("steps", 1), ("update_every", 1), ("update_after_step", 0)):
            value = validate.integer(name, getattr(self, name), minimum, bits=53)
            object.__setattr__(self, name, value)

    def at(self, step: int) -> RunProfile:
        """The profile of the average after ``step`` steps.

        Raises:
            ArgumentError: ``step`` lies outside of [1, ``steps``].
            ArgumentTypeError: ``step`` is not an integer.
        """
        return RunProfile(self, step)

    def updates_at(self, step: int) -> int:
        """Number of updates in the first ``step`` steps."""
        return max(0, step - self.update_after_step) // self.update_every

    def weights(self, updates: int) -> Floats:
        """Weights ``w_m`` of the first updates, an array of length ``updates``."""
        if not updates:
            return np.empty(0)
        counts = np.arange(1, updates + 1, dtype=np.float64)
        with np.errstate(divide="ignore"):  # log1p(−1) of the power function's first update
            weights = weights_of(self.schedule, counts, self.update_every)
        return np.broadcast_to(weights, counts.shape)

    def last_copy(self, updates: int) -> int:
        """Number of the last update with weight 1, which copies the params; 0 without one."""
        if self._formula is not None:
            return self._formula.last_copy(updates)
        copies = self._copies
        before = int(np.searchsorted(copies, updates, side="right"))
        return int(copies[before - 1]) if before else 0

    def log_kept(self, counts: Floats) -> Floats:
        """``L`` after so many updates, interpolated between whole numbers; copies are left out."""
        if self._formula is not None:
            return self._formula.log_kept(counts)
        below = np.floor(counts).astype(np.int64)
        part = counts - below
        table = self._table
        return table[below] + part * (table[np.minimum(below + 1, len(table) - 1)] - table[below])

    @functools.cached_property
    def _formula(self) -> _Formula | None:
        return _formula(self.schedule, self.update_every)

    @functools.cached_property
    def _table(self) -> Floats:
        weights = self._all_weights
        logs = np.log1p(-np.where(weights < 1.0, weights, 0.0))
        return np.concatenate([[0.0], np.cumsum(logs)])

    @functools.cached_property
    def _copies(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.flatnonzero(self._all_weights == 1.0) + 1

    @functools.cached_property
    def _all_weights(self) -> Floats:
        return self.weights(self.updates_at(self.steps))


@final
@dataclasses.dataclass(frozen=True)
class RunProfile:
    """The memory of an average after ``step`` steps of a run; made by :meth:`Run.at`.

    Args:
        run: the schedule and its timing.
        step: an integer in [1, ``run.steps``].

    Raises:
        ArgumentError: ``step`` is out of range.
        ArgumentTypeError: ``step`` is not an integer.
    """

    run: Run
    step: int

    def __post_init__(self) -> None:
        step = validate.integer("step", self.step, minimum=1)
        if step > self.run.steps:
            raise ArgumentError(f"`step` must not exceed the run's {self.run.steps}, got {step}")
        object.__setattr__(self, "step", step)

    @functools.cached_property
    def response(self) -> Floats:
        """Share ``c_i`` of the params after each step ``i``, float64, of length ``step + 1``.

        Element 0 is the share of the initial weights. The shares are at least 0 and sum to 1.
        """
        response = np.zeros(self.step + 1)
        response[self._start] = self._start_share
        updates = np.arange(max(self._copy, 1), self._updates + 1)
        if len(updates):
            kept = np.exp(self._log_now - self.run.log_kept(updates.astype(np.float64)))
            weights = self.run.weights(self._updates)[updates - 1]
            steps = self.run.update_after_step + updates * self.run.update_every
            response[steps] = weights * kept
        return response

    @functools.cached_property
    def tail(self) -> Floats:
        """Share ``F_i = Σ_{j≥i} c_j`` of the movement of each step ``i``, of length ``step + 1``.

        Element 0, the sum of all shares, is 1.
        """
        return np.cumsum(self.response[::-1])[::-1]

    @property
    def initial_share(self) -> float:
        """Share of the initial weights in the average, in [0, 1]."""
        return self._start_share if self._start == 0 else 0.0

    @property
    def mean_age(self) -> float:
        """Mean age of the memory in steps, ``Σ c_i · (T − i)``; initial weights have age ``T``."""
        return float(self.response @ np.arange(self.step, -1.0, -1.0))

    @property
    def relative_width(self) -> float:
        """Standard deviation of the memory over ``T``; the initial weights count at time 0.

        For a power function it tends to the ``std`` of :func:`ema.profiles.std_from_gamma` in a
        long run.
        """
        ages = np.arange(self.step, -1.0, -1.0) - self.mean_age
        return math.sqrt(float(self.response @ (ages * ages))) / self.step

    @property
    def breaks(self) -> tuple[float, ...]:
        """The start of the memory (``update_after_step`` or the last copy) and its last update."""
        return tuple(float(step) for step in sorted({self._full_until, self._last}) if step)

    def tail_at(self, times: Floats) -> Floats:
        """The tail at times above 0; at ``i − ½`` it is that of step ``i``, with ``update_every=1``.

        With longer steps between updates the tail has stairs. This function passes through the
        middle of each.
        """
        run, times = self.run, np.asarray(times, np.float64)
        # times of the middle of update m's steps give m − 1: the movement is in from update m on
        before = (times - run.update_after_step) / run.update_every - 0.5
        before = np.clip(before, self._copy, max(self._updates, self._copy))
        tail = -np.expm1(self._log_now - run.log_kept(before))
        return np.where(times > self._last, 0.0, np.where(times <= self._full_until, 1.0, tail))

    @functools.cached_property
    def _updates(self) -> int:
        return self.run.updates_at(self.step)

    @functools.cached_property
    def _copy(self) -> int:
        return self.run.last_copy(self._updates)

    @functools.cached_property
    def _log_now(self) -> float:
        return float(self.run.log_kept(np.array([float(self._updates)]))[0])

    @property
    def _start(self) -> int:
        """The step whose params the average started from."""
        return min(self.step, self.run.update_after_step)

    @property
    def _start_share(self) -> float:
        if self._copy:
            return 0.0
        return math.exp(self._log_now - float(self.run.log_kept(np.zeros(1))[0]))

    @property
    def _full_until(self) -> int:
        """The last step whose movement is contained whole."""
        return self._start + self._copy * self.run.update_every

    @property
    def _last(self) -> int:
        """The last step whose movement is contained at all."""
        return self._start + self._updates * self.run.update_every


def profile_of(
    decay: float | Schedule, steps: int, *, update_every: int = 1, update_after_step: int = 0
) -> RunProfile:
    """The memory of an average at the end of a run of ``steps`` steps.

    Its ``response`` is the share of each step's params, its ``tail`` the share of each step's
    movement; ``mean_age`` is in steps, ``relative_width`` in parts of the run.

    Args:
        decay: a decay per update in [0, 1], or a schedule, of this library or your own.
        steps: length of the run, at least 1.
        update_every: steps from one update to the next, at least 1.
        update_after_step: the average equals the params up to this step, at least 0.

    Raises:
        ArgumentError: an argument is out of range, or a schedule of your own gives a weight outside
            [0, 1] or NaN.
        ArgumentTypeError: an argument has the wrong type.

    >>> profile = profile_of(0.5, 3)
    >>> profile.response
    array([0.125, 0.125, 0.25 , 0.5  ])
    >>> profile.tail
    array([1.   , 0.875, 0.75 , 0.5  ])
    >>> round(profile.mean_age, 12)
    0.875
    """
    schedule = as_schedule(decay)
    run = Run(schedule, steps, update_every=update_every, update_after_step=update_after_step)
    return run.at(run.steps)


@dataclasses.dataclass(frozen=True)
class _Formula:
    """``L`` for any real number of updates, and where the schedule copies."""

    log_kept: Callable[[Floats], Floats]
    last_copy: Callable[[int], int]


def _formula(schedule: Schedule, span: int) -> _Formula | None:
    """The formula of a schedule; None if the schedule has none and needs a table."""
    if type(schedule) in (PowerFunction, UniformAverage):
        power = schedule.gamma + 1.0 if isinstance(schedule, PowerFunction) else 1.0
        # (1 − 1/m)^power multiplied over m; the first update copies
        return _Formula(
            lambda counts: -power * np.log(np.maximum(counts, 1.0)),
            lambda updates: min(updates, 1),
        )
    if type(schedule) in (ConstantDecay, HalfLife):
        weight = weight_of(schedule, 1, span)
        if weight == 1.0:  # the average is the params of its last update
            return _Formula(lambda counts: 0.0 * counts, lambda updates: updates)
        rate = math.log1p(-weight)
        return _Formula(lambda counts: rate * counts, lambda _: 0)
    return None
