"""Validated options of ``params_ema`` and ``EMA``."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from ema import validate
from ema.errors import ArgumentError, ArgumentTypeError, shown
from ema.options import OnNonfinite, Precision, check_dtype, require_name, schedules_by_name
from ema.schedules import FLOAT_MATH, Namespace, Scalar, Schedule, as_schedule

__all__ = ["NARROW", "Settings"]

NARROW: np.dtype[Any] = jnp.dtype(jnp.bfloat16)
"""The only dtype of an average that is too coarse for plain arithmetic."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class _TracedDecay(Schedule):
    """A plain decay whose value is known only when the step runs."""

    decay: jax.Array

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        del count, span, xp
        return 1.0 - self.decay.astype(jnp.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Validated options of ``params_ema`` and ``EMA``.

    The arguments are those of :func:`~ema.jax_backend.params_ema`, which documents them.

    Attributes:
        schedules: the schedule of each average by its name; an average without a name has the key
            None.
        update_after_step: as given; if it was traced, a traced int32 scalar.
        update_every: likewise.
        accumulator_dtype: dtype of all averages; None: each parameter determines it.
        precision: the precision options.

    Raises:
        ArgumentError: an option is out of its range.
        ArgumentTypeError: an option has the wrong type.

    Warns:
        EMAWarning: a bfloat16 average is rounded to nearest and will not move.
    """

    decay: dataclasses.InitVar[object]
    update_after_step: int | jax.Array
    update_every: int | jax.Array
    accumulator_dtype: Any
    name: dataclasses.InitVar[str | None]
    compensated: dataclasses.InitVar[bool]
    stochastic_rounding: dataclasses.InitVar[bool]
    seed: dataclasses.InitVar[Any]
    on_nonfinite: dataclasses.InitVar[OnNonfinite]
    schedules: dict[str | None, Schedule] = dataclasses.field(init=False)
    precision: Precision = dataclasses.field(init=False)

    def __post_init__(  # noqa: PLR0917  # dataclasses pass all of these by position
        self,
        decay: object,
        name: str | None,
        compensated: bool,
        stochastic_rounding: bool,
        seed: Any,
        on_nonfinite: OnNonfinite,
    ) -> None:
        schedules = _schedules(decay, name)
        dtype = _dtype(self.accumulator_dtype)
        checked = {
            "schedules": schedules,
            "update_after_step": _steps("update_after_step", self.update_after_step, 0),
            "update_every": _steps("update_every", self.update_every, 1),
            "accumulator_dtype": dtype,
            "precision": Precision(
                compensated=compensated,
                stochastic_rounding=stochastic_rounding,
                seed=_seed(seed, is_used=dtype == NARROW),
                on_nonfinite=on_nonfinite,
            ),
        }
        for field, value in checked.items():
            object.__setattr__(self, field, value)
        if dtype == NARROW:
            known = [s for s in schedules.values() if not isinstance(s, _TracedDecay)]
            self.precision.check_narrow("accumulator_dtype", known)

    def with_decay(self, decay: object) -> Settings:
        """The same options with another decay, for one average without a name."""
        return Settings(
            decay=decay,
            update_after_step=self.update_after_step,
            update_every=self.update_every,
            accumulator_dtype=self.accumulator_dtype,
            name=None,
            **dataclasses.asdict(self.precision),
        )


def _schedules(decay: object, name: str | None) -> dict[str | None, Schedule]:
    """The schedule of each average by its name, in the order of the keys of a JAX tree."""
    schedules = schedules_by_name(decay, _schedule)
    if name is None:
        return dict(sorted(schedules.items())) if None not in schedules else schedules
    if None not in schedules:
        raise ArgumentError(
            f"`name` must not be given where `decay` holds the names, got {shown(name)}"
        )
    require_name("name", name)
    return {name: schedules[None]}


def _schedule(decay: object, argument: str) -> Schedule:
    if not isinstance(decay, jax.Array | np.ndarray | np.generic):
        return as_schedule(decay, argument)
    _require_scalar(argument, decay)
    dtype = decay.dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ArgumentTypeError(f"`{argument}` must be a real number, got an array of {dtype}")
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise ArgumentError(
            f"`{argument}` must be at least float32, got {dtype}, in which 0.9999 is"
            f" {float(np.asarray(0.9999, dtype))}: optax.inject_hyperparams gives it the dtype of"
            " the params; pass hyperparam_dtype=jnp.float32 there"
        )
    if isinstance(decay, jax.core.Tracer):
        return _TracedDecay(decay=decay)
    return as_schedule(decay.item(), argument)


def _steps(name: str, value: Any, minimum: int) -> int | jax.Array:
    """A static number of steps, or a traced one, whose value cannot be checked yet."""
    if isinstance(value, jax.Array | np.ndarray):
        _require_scalar(name, value)
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise ArgumentTypeError(f"`{name}` must be an integer, got an array of {value.dtype}")
        if isinstance(value, jax.core.Tracer):
            return value.astype(jnp.int32)
        value = value.item()
    return validate.integer(name, value, minimum, bits=31)  # JAX counts in int32


def _require_scalar(name: str, value: Any) -> None:
    if value.ndim != 0:
        raise ArgumentTypeError(f"`{name}` must be a scalar, got an array of shape {value.shape}")


def _dtype(dtype: Any) -> np.dtype[Any] | None:
    if dtype is None:
        return None
    if isinstance(dtype, jax.Array):
        raise ArgumentTypeError(
            "`accumulator_dtype` must be a dtype, got an array: optax.inject_hyperparams calls"
            ' jnp.float32 as if it were a schedule; pass static_args="accumulator_dtype" there'
        )
    try:
        chosen: np.dtype[Any] = jnp.dtype(dtype)
    except TypeError:
        raise ArgumentTypeError(
            f"`accumulator_dtype` must be a dtype, got {shown(dtype)}"
        ) from None
    check_dtype("accumulator_dtype", str(chosen))
    return chosen


def _seed(seed: Any, *, is_used: bool) -> Any:
    if not isinstance(seed, jax.Array | np.ndarray):
        return seed
    _require_scalar("seed", seed)
    if not isinstance(seed, jax.core.Tracer):
        return seed.item()
    if not is_used:  # optax.inject_hyperparams traces defaults too
        return 0
    raise ArgumentTypeError(
        "`seed` must be an integer, got a traced array: optax.inject_hyperparams traces it;"
        ' pass static_args=("accumulator_dtype", "seed") there'
    )
