"""Profiles in continuous time, each with its formula, and the profile of a plain checkpoint.

They have no step length: a run of 1,000 steps and one of a million have the same shape, stretched.
Use :mod:`ema.profiles.runs` for the exact shares after a number of updates.

The formulas use ``τ`` for the time of a step and ``T`` for ``step``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import final

import numpy as np

from ema import validate
from ema.errors import ArgumentError
from ema.profiles.profile import Floats
from ema.widths import gamma_from_std, std_from_gamma

__all__ = ["Checkpoint", "ExponentialProfile", "PowerProfile", "UniformProfile"]


@final
@dataclasses.dataclass(frozen=True)
class PowerProfile:
    """A power-function average, whose memory is a fixed share of the run.

    response(τ) = (γ+1) · τ^γ / T^(γ+1),  tail(τ) = 1 − (τ/T)^(γ+1)

    Source: EDM2 (Karras et al. 2024, arXiv:2312.02696), section 3.1 and appendix C.

    Args:
        gamma: the exponent, at least 0.
        step: time of the average, above 0.

    Raises:
        ArgumentError: an argument is out of range.
        ArgumentTypeError: an argument is not a number.

    >>> profile = PowerProfile.from_std(0.1, 1000)
    >>> round(profile.relative_width, 12), round(profile.mean_age)
    (0.1, 112)
    """

    gamma: float
    step: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", validate.non_negative("gamma", self.gamma))
        object.__setattr__(self, "step", validate.positive("step", self.step))

    @classmethod
    def from_std(cls, std: float, step: float) -> PowerProfile:
        """The profile of relative width ``std``, in (0, 0.2886…]."""
        return cls(gamma_from_std(std), step)

    @property
    def initial_share(self) -> float:
        """Always 0: the first step replaces the initial weights."""
        return 0.0

    @property
    def breaks(self) -> tuple[float, ...]:
        """The end of the memory."""
        return (self.step,)

    @property
    def mean_age(self) -> float:
        """Mean age of the memory in steps: ``T / (γ+2)``."""
        return self.step / (self.gamma + 2.0)

    @property
    def relative_width(self) -> float:
        """Standard deviation of the memory over ``T``; see :func:`ema.profiles.std_from_gamma`."""
        return std_from_gamma(self.gamma)

    def response_at(self, times: Floats) -> Floats:
        """Share of the weights per step at the times ``τ > 0``; 0 past ``step``."""
        shares = _elapsed(times, self.step) ** self.gamma
        return np.where(
            np.asarray(times) <= self.step, shares * (self.gamma + 1.0) / self.step, 0.0
        )

    def tail_at(self, times: Floats) -> Floats:
        """Share of the movement at the times ``τ > 0``; 0 past ``step``."""
        with np.errstate(divide="ignore"):  # log 0 at the start of the run, where the tail is 1
            logs = np.log(_elapsed(times, self.step))
        return -np.expm1((self.gamma + 1.0) * logs)


@final
@dataclasses.dataclass(frozen=True)
class ExponentialProfile:
    """An exponential average, which keeps a share of the initial weights.

    response(τ) = ln2/h · 2^(−(T−τ)/h),  tail(τ) = 1 − 2^(−(T−τ)/h),  initial share 2^(−T/h)

    Args:
        half_life: ``h`` in steps, above 0.
        step: time of the average, above 0.

    Raises:
        ArgumentError: an argument is out of range.
        ArgumentTypeError: an argument is not a number.
    """

    half_life: float
    step: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "half_life", validate.positive("half_life", self.half_life))
        object.__setattr__(self, "step", validate.positive("step", self.step))

    @property
    def initial_share(self) -> float:
        """Share of the initial weights: ``2^(−T/h)``."""
        return float(np.exp2(-self.step / self.half_life))

    @property
    def breaks(self) -> tuple[float, ...]:
        """The end of the memory."""
        return (self.step,)

    @property
    def mean_age(self) -> float:
        """Mean age in steps, the initial weights at age ``T``: ``h/ln2 · (1 − 2^(−T/h))``."""
        return self.half_life / math.log(2.0) * -math.expm1(-self._halvings)

    @property
    def relative_width(self) -> float:
        """Standard deviation of the memory, the initial weights at time 0, over ``T``."""
        # variance of age / T with x = T · ln2/h: (1 − e^(−2x) − 2x · e^(−x)) / x²
        x = self._halvings
        kept = math.exp(-x)
        if x < 0.5:  # it is 2 · e^(−x) · (sinh x − x) / x², and the difference would cancel
            series = 1.0
            for k in (110.0, 72.0, 42.0, 20.0):
                series = 1.0 + series * x * x / k
            return math.sqrt(kept * x * series / 3.0)
        return math.sqrt(1.0 - kept * kept - 2.0 * x * kept) / x

    @property
    def _halvings(self) -> float:
        return math.log(2.0) * self.step / self.half_life

    def response_at(self, times: Floats) -> Floats:
        """Share of the weights per step at the times ``τ > 0``; 0 past ``step``."""
        ages = self.step - np.asarray(times, np.float64)
        rate = math.log(2.0) / self.half_life
        return np.where(ages >= 0.0, rate * np.exp(-rate * np.maximum(ages, 0.0)), 0.0)

    def tail_at(self, times: Floats) -> Floats:
        """Share of the movement at the times ``τ > 0``; 0 past ``step``."""
        ages = np.maximum(self.step - np.asarray(times, np.float64), 0.0)
        return -np.expm1(-math.log(2.0) * ages / self.half_life)


@final
@dataclasses.dataclass(frozen=True)
class UniformProfile:
    """The plain mean of the last part of a run.

    response(τ) = 1 / (f·T) from τ = (1−f)·T on,  tail(τ) = min(1, (T−τ) / (f·T))

    Args:
        last: ``f``, the part of the run, in (0, 1].
        step: time of the average, above 0.

    Raises:
        ArgumentError: an argument is out of range.
        ArgumentTypeError: an argument is not a number.
    """

    last: float
    step: float

    def __post_init__(self) -> None:
        last = validate.positive("last", self.last)
        if last > 1.0:
            raise ArgumentError(f"`last` must lie in (0, 1], got {last}")
        object.__setattr__(self, "last", last)
        object.__setattr__(self, "step", validate.positive("step", self.step))

    @property
    def initial_share(self) -> float:
        """Always 0."""
        return 0.0

    @property
    def breaks(self) -> tuple[float, ...]:
        """The start and the end of the memory."""
        start = (1.0 - self.last) * self.step
        return (start, self.step) if start > 0.0 else (self.step,)

    @property
    def mean_age(self) -> float:
        """Mean age of the memory in steps: ``f·T / 2``."""
        return 0.5 * self.last * self.step

    @property
    def relative_width(self) -> float:
        """Standard deviation of the memory over ``T``: ``f / √12``."""
        return self.last / math.sqrt(12.0)

    def response_at(self, times: Floats) -> Floats:
        """Share of the weights per step at the times ``τ > 0``; 0 outside of the last part."""
        times = np.asarray(times, np.float64)
        inside = (times >= (1.0 - self.last) * self.step) & (times <= self.step)
        return np.where(inside, 1.0 / (self.last * self.step), 0.0)

    def tail_at(self, times: Floats) -> Floats:
        """Share of the movement at the times ``τ > 0``; 0 past ``step``."""
        ages = self.step - np.asarray(times, np.float64)
        return np.clip(ages / (self.last * self.step), 0.0, 1.0)


@final
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The params of one step: all movement up to it. Step 0 stands for the initial weights.

    tail(τ) = 1 up to T, then 0

    Args:
        step: an integer, at least 0.

    Raises:
        ArgumentError: ``step`` is negative.
        ArgumentTypeError: ``step`` is not an integer.
    """

    step: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", validate.integer("step", self.step, minimum=0))

    @property
    def initial_share(self) -> float:
        """1 for the initial weights, 0 for a later step."""
        return float(self.step == 0)

    @property
    def breaks(self) -> tuple[float, ...]:
        """The step, where the tail drops from 1 to 0."""
        return (float(self.step),) if self.step else ()

    def tail_at(self, times: Floats) -> Floats:
        """Share of the movement at the times ``τ > 0``: 1 up to ``step``, then 0."""
        return (np.asarray(times) <= self.step).astype(np.float64)


def _elapsed(times: Floats, step: float) -> Floats:
    """Part of the run that has passed, at most 1."""
    return np.minimum(np.asarray(times, np.float64) / step, 1.0)
