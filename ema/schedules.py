"""How much each update weighs: one frozen dataclass a schedule.

A schedule answers :meth:`Schedule.weight`, the weight ``w = 1 − decay`` of one update in
``average = average + w · (params − average)``. It is the weight that is computed, never
``1 − decay``: next to decay 1 the difference keeps few of its digits.

``weight(count, span)`` is asked for the update number ``count`` (1, 2, …), which closes ``span``
steps (``update_every``); ``t = count · span`` steps have passed by then. The same expression runs
on Python floats, on NumPy arrays and on a traced JAX value: ``xp`` is the namespace of the few
functions that it needs. All of it is float64; each backend rounds once, at the end.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, final

from ema import validate
from ema.errors import ArgumentError, ArgumentTypeError
from ema.namespace import FLOAT_MATH, Namespace, Scalar
from ema.plain_values import number_from_plain, plain_fields
from ema.widths import gamma_from_std

__all__ = [
    "EXAMPLES",
    "FLOAT_MATH",
    "SCHEDULES",
    "ConstantDecay",
    "CosineDecay",
    "DebiasedDecay",
    "ExponentialRamp",
    "HalfLife",
    "HalfLifeRampup",
    "InverseGammaWarmup",
    "Namespace",
    "PowerFunction",
    "RampWarmup",
    "Scalar",
    "Schedule",
    "UniformAverage",
    "as_schedule",
    "is_ours",
    "schedule_from_dict",
]


class Schedule(ABC):
    """The weight of every update; see the subclasses, one a row of the table in the docs.

    A subclass of your own defines :meth:`weight` and works wherever a schedule is taken::

        @dataclasses.dataclass(frozen=True)
        class Warmup(ema.Schedule):
            decay: float
            updates: float

            def weight(self, count, span=1, xp=None):
                return xp.maximum(1 - self.decay, xp.exp(-count / self.updates))

    A saved state describes it by its class and fields where those are plain values
    (:meth:`to_dict`); loading never needs the class.
    """

    @abstractmethod
    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        """Weight, in [0, 1] and float64, of update ``count`` (from 1), which closes ``span`` steps.

        Args:
            count: number of the update, a float or an array of floats.
            span: steps from one update to the next.
            xp: namespace of the functions for that kind of number.
        """

    def to_dict(self) -> dict[str, Any]:
        """Class and fields as plain values: ``{"schedule": "HalfLife", "steps": 1000.0}``.

        These can be written as JSON: an infinite number is the string ``"inf"``. A field that is
        itself called ``schedule`` gets an underscore behind its name.

        Raises:
            ArgumentTypeError: the class is not of this library, and the value of a field is not
                plain, for instance an array or a function.
        """
        fields = {
            f"{name}_" if name.rstrip("_") == "schedule" else name: value
            for name, value in plain_fields(self).items()
        }
        return {"schedule": type(self).__name__, **fields}

    def _validate(self, **checks: Any) -> None:
        """Replace each named field by what its check returns, a plain float."""
        for field, check in checks.items():
            object.__setattr__(self, field, check(field, getattr(self, field)))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantDecay(Schedule):
    """The same decay ``β`` at every *update*; what a plain number means.

    decay = β
    """

    decay: float

    def __post_init__(self) -> None:
        self._validate(decay=validate.fraction)

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        return 1.0 - self.decay


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLife(Schedule):
    """A half-life in *steps*, the same whatever ``update_every`` is.

    decay = 2^(−span/steps)
    """

    steps: float

    def __post_init__(self) -> None:
        self._validate(steps=validate.positive)

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        return -xp.expm1(-math.log(2.0) * (span / self.steps))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfLifeRampup(Schedule):
    """A half-life in steps that starts short: at most ``rampup_ratio`` of the steps so far.

    decay = 2^(−span/h),  h = min(steps, rampup_ratio · t),  t = count · span

    With ``steps=math.inf`` the half-life stays a fixed share of the run. Source: EDM (Karras et
    al. 2022, arXiv:2206.00364), ``ema_rampup_ratio`` of its training loop; torchtitan,
    ``half_life_fraction``.
    """

    steps: float
    rampup_ratio: float = 0.05

    def __post_init__(self) -> None:
        self._validate(steps=validate.positive_or_infinite, rampup_ratio=validate.positive)

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        half_life = xp.minimum(self.steps, self.rampup_ratio * (count * span))
        return -xp.expm1(-math.log(2.0) * (span / half_life))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseGammaWarmup(Schedule):
    """A decay that grows from ``min_decay`` to ``β`` as a power of the number of updates.

    decay = max(min_decay, min(β, 1 − (1 + n/γ)^−p)),  n = count

    Source: diffusers ``EMAModel(use_ema_warmup=True)``, ema-pytorch, timm ``ModelEmaV3``.
    """

    decay: float
    inv_gamma: float = 1.0
    power: float = 2.0 / 3.0
    min_decay: float = 0.0

    def __post_init__(self) -> None:
        self._validate(
            decay=validate.fraction,
            inv_gamma=validate.positive,
            power=validate.positive,
            min_decay=validate.fraction,
        )
        if self.min_decay > self.decay:
            raise ArgumentError(
                f"`min_decay` must not exceed `decay` ({self.decay}), got {self.min_decay}"
            )

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        ramp = xp.exp(-self.power * xp.log1p(count / self.inv_gamma))
        return xp.minimum(1.0 - self.min_decay, xp.maximum(1.0 - self.decay, ramp))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class RampWarmup(Schedule):
    """A decay that starts at 2/11 and grows to ``β``.

    decay = min(β, (1 + n) / (10 + n)),  n = count

    Source: TensorFlow ``ExponentialMovingAverage(num_updates=…)``, torch-ema.
    """

    decay: float

    def __post_init__(self) -> None:
        self._validate(decay=validate.fraction)

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        return xp.maximum(1.0 - self.decay, 9.0 / (10.0 + count))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExponentialRamp(Schedule):
    """A decay that grows from about 0 to ``β`` with the time constant ``tau``, in *updates*.

    decay = β · (1 − e^(−n/τ)),  n = count

    Source: YOLOv5 and ultralytics, ``ModelEMA`` (there β = 0.9999, τ = 2000).
    """

    decay: float
    tau: float

    def __post_init__(self) -> None:
        self._validate(decay=validate.fraction, tau=validate.positive)

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        # a sum of positive numbers: 1 − β · (1 − e^(−n/τ)) would cancel
        return xp.minimum(1.0, (1.0 - self.decay) + self.decay * xp.exp(-(count / self.tau)))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class DebiasedDecay(Schedule):
    """Adam's bias correction: the average forgets the initial weights at once.

    decay = 1 − (1 − β) / (1 − β^n),  n = count

    The first update copies; after ``n`` updates the average is the weighted mean of ``n`` values
    with weights proportional to ``β^(n−k)``. Source: Kingma and Ba 2015, arXiv:1412.6980,
    section 3.
    """

    decay: float

    def __post_init__(self) -> None:
        self._validate(decay=validate.fraction)
        if self.decay == 1.0:
            raise ArgumentError("`decay` must be below 1, got 1.0: use UniformAverage()")

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        if self.decay == 0.0:
            return 1.0
        forgotten = -xp.expm1(count * math.log(self.decay))
        return xp.minimum(1.0, (1.0 - self.decay) / forgotten)  # an ulp above 1 at count 1


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerFunction(Schedule):
    """Memory that is a fixed share of the run: weights of time ``τ`` count in proportion to ``τ^γ``.

    decay = (1 − span/t)^(γ+1),  t = count · span

    Source: EDM2 (Karras et al. 2024, arXiv:2312.02696), section 3.1.
    """

    gamma: float

    def __post_init__(self) -> None:
        self._validate(gamma=validate.non_negative)

    @classmethod
    def from_std(cls, std: float) -> PowerFunction:
        """The one whose memory has relative width ``std``, in (0, 0.2886…], for instance 0.1."""
        return cls(gamma=gamma_from_std(std))

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        later = xp.maximum(count, 2.0)  # log1p(−1) is −∞, which jax_debug_infs reports
        weight = -xp.expm1((self.gamma + 1.0) * xp.log1p(-1.0 / later))  # span / t = 1 / count
        return xp.maximum(2.0 - count, weight)  # 1 at the first update


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineDecay(Schedule):
    """A decay that goes from ``start`` to ``end`` along half a cosine in ``total_steps`` steps.

    1 − decay = (1 − end) + (end − start) · sin²(π/2 · (1 − min((t − span)/total_steps, 1)))

    with ``t = count · span``: the first update has ``start``, and the first one after
    ``total_steps`` steps has ``end``. The teacher's momentum of BYOL (Grill et al. 2020,
    arXiv:2006.07733, section 3.2) and DINO, which count their steps from 0.
    """

    start: float
    end: float = 1.0
    total_steps: float

    def __post_init__(self) -> None:
        self._validate(
            start=validate.fraction, end=validate.fraction, total_steps=validate.positive
        )

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        # this form ends at exactly 0 also where a compiler multiplies by 1/total_steps
        before = (count - 1.0) * span  # steps before those that this update closes
        remaining = xp.maximum(0.0, self.total_steps - before) / self.total_steps
        sine = xp.sin(0.5 * math.pi * remaining)
        weight = (1.0 - self.end) + (self.end - self.start) * (sine * sine)
        return xp.minimum(1.0, xp.maximum(0.0, weight))


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformAverage(Schedule):
    """The plain mean of the weights of all updates.

    decay = 1 − 1/n,  n = count

    Source: Polyak and Juditsky 1992; stochastic weight averaging (arXiv:1803.05407).
    """

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        return 1.0 / count


EXAMPLES: tuple[Schedule, ...] = (
    ConstantDecay(decay=0.99),
    HalfLife(steps=50),
    HalfLifeRampup(steps=50, rampup_ratio=0.1),
    InverseGammaWarmup(decay=0.98),
    RampWarmup(decay=0.95),
    ExponentialRamp(decay=0.98, tau=30),
    DebiasedDecay(decay=0.99),
    PowerFunction.from_std(0.1),
    CosineDecay(start=0.9, total_steps=300),
    UniformAverage(),
)
"""The table of schedules: one example of each class. Everything that knows the classes reads it."""

SCHEDULES: Mapping[str, type[Schedule]] = {type(each).__name__: type(each) for each in EXAMPLES}
"""The only classes that are made from a saved state or a command line."""


def is_ours(schedule: Schedule) -> bool:
    """Whether this library defines the class, and not the user."""
    return SCHEDULES.get(type(schedule).__name__) is type(schedule)


def as_schedule(decay: object, name: str = "decay") -> Schedule:
    """The schedule that a ``decay=`` argument means: a number is a :class:`ConstantDecay`.

    Raises:
        ArgumentError: the number is outside [0, 1] or NaN.
        ArgumentTypeError: it is neither a number nor a schedule.
    """
    if isinstance(decay, Schedule):
        return decay
    if isinstance(decay, type) and issubclass(decay, Schedule):
        raise ArgumentTypeError(
            f"`{name}` must be a schedule with its fields, got the class {decay.__name__}"
        )
    try:
        return ConstantDecay(decay=validate.fraction(name, decay))
    except ArgumentTypeError:
        raise ArgumentTypeError(
            f"`{name}` must be a number in [0, 1] or a schedule,"
            f" got {decay!r} ({type(decay).__name__})"
        ) from None


def schedule_from_dict(fields: Mapping[str, Any]) -> Schedule:
    """The inverse of :meth:`Schedule.to_dict`.

    Raises:
        ArgumentError: the class is unknown, or a field is missing, unknown or out of range.
        ArgumentTypeError: a field has the wrong type.
    """
    if not isinstance(fields, Mapping) or "schedule" not in fields:
        raise ArgumentError(f"a schedule needs its class under the key 'schedule', got {fields!r}")
    name = fields["schedule"]
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ArgumentError(f"`schedule` must be one of {', '.join(SCHEDULES)}, got {name!r}")
    cls: Any = SCHEDULES[name]
    given = {key: number_from_plain(v) for key, v in fields.items() if key != "schedule"}
    known = {field.name for field in dataclasses.fields(cls)}
    needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if wrong := sorted((needed - given.keys()) | (given.keys() - known), key=str):
        raise ArgumentError(
            f"{name} takes the fields {sorted(known)}, of which {sorted(needed)} are needed:"
            f" wrong or absent: {wrong}"
        )
    schedule: Schedule = cls(**given)
    return schedule
