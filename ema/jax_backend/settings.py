"""What ``params_ema`` is told: decay, steps, dtype, precision and names, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from ema import validate
from ema.errors import ArgumentError, ArgumentTypeError, shown
from ema.precision import OnNonfinite, Precision
from ema.schedules import FLOAT_MATH, Namespace, Scalar, Schedule, as_schedule

__all__ = ["NARROW", "accumulator", "named_schedules", "precision_of", "steps"]

NARROW: np.dtype[Any] = jnp.dtype(jnp.bfloat16)
"""The one dtype of an average that is too coarse for plain arithmetic."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class _TracedDecay(Schedule):
    """A plain decay whose value is known only when the step runs."""

    decay: jax.Array

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        del count, span, xp
        return 1.0 - self.decay.astype(jnp.float64)


def named_schedules(decay: object, name: str | None) -> dict[str | None, Schedule]:
    """The schedule of each average by its name; ``None`` is the name of one without.

    Raises:
        ArgumentError: a decay or a name is out of its range, or there are none.
        ArgumentTypeError: a decay or a name has the wrong type.
    """
    if not isinstance(decay, Mapping):
        if name is not None:
            _require_name("name", name)
        return {name: _schedule(decay)}
    if name is not None:
        raise ArgumentError(f"`name` must not be given where `decay` holds the names, got {name!r}")
    if not decay:
        raise ArgumentError(f"`decay` must name at least one average, got {decay!r}")
    for key in decay:
        _require_name("decay", key)
    return {key: _schedule(decay[key]) for key in sorted(decay)}  # the order of a jax.tree


def _schedule(decay: object) -> Schedule:
    if not isinstance(decay, jax.Array | np.ndarray | np.generic):
        return as_schedule(decay)
    _require_scalar("decay", decay)
    dtype = decay.dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ArgumentTypeError(f"`decay` must be a real number, got an array of {dtype}")
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise ArgumentError(
            f"`decay` must be at least float32, got {dtype}, in which 0.9999 is"
            f" {float(np.asarray(0.9999, dtype))}: optax.inject_hyperparams takes the dtype of the"
            " params for it unless told hyperparam_dtype=jnp.float32"
        )
    if isinstance(decay, jax.core.Tracer):
        return _TracedDecay(decay=decay)
    return as_schedule(decay.item())


def steps(name: str, value: Any, *, minimum: int) -> int | jax.Array:
    """A static number of steps, or a traced one, whose value nobody can check yet.

    Raises:
        ArgumentError: it is below the minimum, or no int32.
        ArgumentTypeError: it is no integer.
    """
    if isinstance(value, jax.Array | np.ndarray):
        _require_scalar(name, value)
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise ArgumentTypeError(f"`{name}` must be an integer, got an array of {value.dtype}")
        if isinstance(value, jax.core.Tracer):
            return value.astype(jnp.int32)
        value = value.item()
    if (number := validate.integer(name, value, minimum)) >= 1 << 31:
        raise ArgumentError(
            f"`{name}` must be below 2**31, where JAX counts no further, got {shown(number)}"
        )
    return number


def _require_scalar(name: str, value: Any) -> None:
    if value.ndim != 0:
        raise ArgumentTypeError(f"`{name}` must be a scalar, got an array of shape {value.shape}")


def accumulator(dtype: Any) -> np.dtype[Any] | None:
    """The dtype asked for; ``None`` leaves it to each parameter.

    Raises:
        ArgumentError: it is neither float32 nor float64 nor bfloat16.
        ArgumentTypeError: it is no dtype.
    """
    if dtype is None:
        return None
    if isinstance(dtype, jax.Array):
        raise ArgumentTypeError(
            "`accumulator_dtype` must be a dtype, got an array: optax.inject_hyperparams calls"
            ' jnp.float32 as if it were a schedule unless told static_args="accumulator_dtype"'
        )
    try:
        chosen: np.dtype[Any] = jnp.dtype(dtype)
    except TypeError:
        raise ArgumentTypeError(f"`accumulator_dtype` must be a dtype, got {dtype!r}") from None
    if chosen not in (np.float32, np.float64, NARROW):
        reason = ""
        if chosen == np.float16:
            reason = ": its range ends at 65504, and weights overflow; bfloat16 is as small"
        raise ArgumentError(
            f"`accumulator_dtype` must be float32, float64 or bfloat16, got {chosen}{reason}"
        )
    return chosen


def precision_of(
    chosen: np.dtype[Any] | None,
    schedules: Mapping[str | None, Schedule],
    *,
    compensated: bool,
    stochastic_rounding: bool,
    seed: Any,
    on_nonfinite: OnNonfinite,
) -> Precision:
    """The options on precision, for averages of the dtype ``chosen``.

    Raises:
        ArgumentError: one is out of its range, or they exclude each other.
        ArgumentTypeError: one has the wrong type.

    Warns:
        EMAWarning: the average will not move.
    """
    narrow = chosen == NARROW
    if isinstance(seed, jax.Array | np.ndarray):
        _require_scalar("seed", seed)
        if not isinstance(seed, jax.core.Tracer):
            seed = seed.item()
        elif not narrow:
            seed = 0  # nothing asks for it, and optax.inject_hyperparams traces defaults too
        else:
            raise ArgumentTypeError(
                "`seed` must be an integer, got a traced array: optax.inject_hyperparams traces it"
                ' unless told static_args=("accumulator_dtype", "seed")'
            )
    precision = Precision(
        compensated=compensated,
        stochastic_rounding=stochastic_rounding,
        seed=seed,
        on_nonfinite=on_nonfinite,
    )
    if narrow:
        known = [s for s in schedules.values() if not isinstance(s, _TracedDecay)]
        precision.check_narrow("accumulator_dtype", known)
    return precision


def _require_name(argument: str, name: object) -> None:
    if not isinstance(name, str):
        raise ArgumentTypeError(
            f"`{argument}` must name averages by a string, got {name!r} ({type(name).__name__})"
        )
    if not name:
        raise ArgumentError(f"`{argument}` must not hold an empty name, got ''")
