"""The equation: one step of an exponential moving average.

    average + weight · (params − average)                       weight < 0.5
    params  − (params − average) · (1 − weight)                 otherwise

``ema/torch_backend/update/equation.py`` has the same equations for PyTorch; the two backends agree
to the last bit. This form of the equation is the one that XLA contracts to the same fused
multiply-add as ``torch.Tensor.lerp_``. Each branch subtracts the smaller correction. The weight
``1 − decay`` is the basic quantity, because ``decay · average + (1 − decay) · params`` is wrong by
1e-3 at decay 0.99999.

Two other equations keep the part of an update that rounding would lose: one keeps a remainder
beside the average, the other rounds a bfloat16 average up or down at random.

Sources: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; Ruppert
1988, "Efficient Estimations from a Slowly Convergent Robbins-Monro Process"; Kahan 1965,
"Pracniques: Further Remarks on Reducing Truncation Errors".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ema.errors import ArgumentError, ArgumentTypeError
from ema.jax_backend.selection import widen
from ema.jax_backend.update.rounding import by_chance, round_up, to_nearest
from ema.schedules import Scalar, Schedule, is_ours
from ema.weights import ask, checked_weight

__all__ = ["lerp", "lerp_compensated", "lerp_narrow", "update_weight"]


@jax.jit  # jitted here, because un-jitted operations are not contracted and differ in last bits
def lerp(average: jax.Array, params: jax.Array, weight: jax.Array) -> jax.Array:
    """One update of the average of one array.

    Args:
        average: the average so far, any shape; float32, float64 or complex.
        params: the live values; same shape and dtype.
        weight: ``1 − decay`` in [0, 1]; a scalar in the (real) dtype of the average.

    Returns:
        Exactly ``average`` at weight 0, exactly ``params`` at weight 1, a value between them
        otherwise; shape and dtype of ``average``. The real and imaginary parts of complex arrays
        are averaged separately.

    Example:
        >>> import jax.numpy as jnp
        >>> lerp(jnp.float32(1.0), jnp.float32(2.0), jnp.float32(0.25))
        Array(1.25, dtype=float32)
    """
    if jnp.iscomplexobj(average):
        return lax.complex(
            _lerp(jnp.real(average), jnp.real(params), weight),
            _lerp(jnp.imag(average), jnp.imag(params), weight),
        )
    return _lerp(average, params, weight)


def _lerp(average: jax.Array, params: jax.Array, weight: jax.Array) -> jax.Array:
    near = average + weight * (params - average)
    far = params - (params - average) * (1 - weight)
    mixed = jnp.where(weight < 0.5, near, far)
    # Inf − Inf and 0 · Inf are NaN, so weights 0 and 1 copy instead of computing.
    return jnp.where(weight == 0, average, jnp.where(weight == 1, params, mixed))


@jax.jit
def lerp_compensated(
    average: jax.Array, remainder: jax.Array, params: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One update of an average that keeps its rounding error in a remainder.

        y = remainder + weight · ((params − average) − remainder)
        average' = average + y
        remainder' = y − (average' − average)

    Args:
        average: the average so far, any shape; float32, float64 or complex.
        remainder: the exact average minus ``average``; same shape and dtype.
        params: the live values; same shape and dtype.
        weight: ``1 − decay`` in [0, 1]; a scalar in the (real) dtype of the average.

    Returns:
        Average and remainder: exactly unchanged at weight 0, exactly ``params`` and 0 at weight 1.

    Example:
        >>> import jax.numpy as jnp
        >>> lerp_compensated(jnp.float32(1), jnp.float32(0), jnp.float32(2), jnp.float32(1e-9))
        (Array(1., dtype=float32), Array(1.e-09, dtype=float32))
    """
    if jnp.iscomplexobj(average):
        real, imag = (
            _compensated(part(average), part(remainder), part(params), weight)
            for part in (jnp.real, jnp.imag)
        )
        return lax.complex(real[0], imag[0]), lax.complex(real[1], imag[1])
    return _compensated(average, remainder, params, weight)


def _compensated(
    average: jax.Array, remainder: jax.Array, params: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    y = remainder + weight * ((params - average) - remainder)
    moved = average + y
    lost = y - (moved - average)
    none, all_ = weight == 0, weight == 1
    return (
        jnp.where(none, average, jnp.where(all_, params, moved)),
        jnp.where(none, remainder, jnp.where(all_, jnp.zeros_like(lost), lost)),
    )


@jax.jit
def lerp_narrow(
    average: jax.Array, params: jax.Array, weight: jax.Array, key: jax.Array | None
) -> jax.Array:
    """One update of a bfloat16 average: :func:`lerp` in float32, rounded to one of two neighbors.

    Args:
        average: the average so far, any shape; bfloat16.
        params: the live values in float32; same shape.
        weight: ``1 − decay`` in [0, 1]; a float32 scalar.
        key: key of the random bits of this tensor and update, a uint32 scalar; None rounds to
            nearest.

    Returns:
        A bfloat16 array: exactly ``average`` at weight 0, ``params`` rounded to nearest at weight
        1. Otherwise its expected value over the keys is the result of :func:`lerp`.

    Raises:
        StateError: only a part of the array is visible, inside ``jax.shard_map``.

    Example:
        >>> import jax.numpy as jnp
        >>> average, params, weight = jnp.bfloat16(1), jnp.float32(2), jnp.float32(0.001)
        >>> lerp_narrow(average, params, weight, None)  # the next above 1 is 1.0078125
        Array(1, dtype=bfloat16)
        >>> lerp_narrow(average, params, weight, jnp.uint32(8))
        Array(1.00781, dtype=bfloat16)
    """
    wide = lerp(widen(average, jnp.dtype(jnp.float32)), params, weight)
    up = to_nearest(wide)
    if key is not None:
        up = jnp.where(weight == 1, up, by_chance(wide, key))  # weight 1 copies the params
    return jnp.where(weight == 0, average, round_up(wide, up))


def update_weight(
    schedule: Schedule, count: jax.Array, span: int | jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Weight of update number ``count``, computed in float64 and rounded once.

    Float32 arithmetic would be off by 4e-7 at nearly every count, and would differ from the weights
    that PyTorch gets from the same schedule.

    Args:
        schedule: the schedule of the average.
        count: number of the update, from 1; a traced or concrete int32 scalar.
        span: steps from one update to the next (``update_every``), static or an int32 scalar.
        dtype: float32 or float64.

    Returns:
        A scalar of that dtype in [0, 1]. A weight that a user's schedule computes from a traced
        count cannot be checked, and is returned as it is.

    Raises:
        ArgumentError: a user's schedule gives a weight outside [0, 1] or NaN, or cannot be traced.
        ArgumentTypeError: a user's schedule gives something other than a number.
    """
    with jax.enable_x64(True):
        if isinstance(span, jax.Array):
            span = span.astype(jnp.float64)  # count · span overflows int32
        weight = _answer(schedule, count.astype(jnp.float64), span)
        return jnp.asarray(weight, jnp.float64).astype(dtype)


def _answer(schedule: Schedule, count: jax.Array, span: int | jax.Array) -> Scalar:
    """The weight from the schedule, checked as far as possible while JAX traces it."""
    if is_ours(schedule):
        return schedule.weight(count, span, jnp)
    try:
        weight = ask(schedule, count, span, jnp)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise ArgumentError(
            f"the weight of `{schedule!r:.200}` must be an expression of `xp` (jax.numpy), because"
            f" JAX traces `count`: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(weight, jax.core.Tracer):
        number = None if isinstance(count, jax.core.Tracer) else int(count)
        return checked_weight(schedule, weight, number)
    if weight.shape != () or not _is_real(weight):
        raise ArgumentTypeError(
            f"the weight of `{schedule!r:.200}` must be a number, got an array of shape"
            f" {weight.shape} and dtype {weight.dtype}"
        )
    return weight


def _is_real(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
