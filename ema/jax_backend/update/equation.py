"""The equation: one step of an exponential moving average.

    average + weight · (params − average)                       weight < 0.5
    params  − (params − average) · (1 − weight)                 otherwise

``ema/torch_backend/update/equation.py`` is the same page for PyTorch; the two agree to the last bit.
Here it is written out in the form that XLA contracts to the same fused multiply-add as
``torch.Tensor.lerp_``. Each branch subtracts the smaller correction, and ``weight = 1 − decay`` is
the primitive: ``decay · average + (1 − decay) · params`` is wrong by 1e-3 at decay 0.99999.

Two others keep what float32 loses in the sum: a remainder beside the average, and a bfloat16
average that is rounded by chance.

Sources: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; Ruppert
1988, "Efficient Estimations from a Slowly Convergent Robbins-Monro Process"; Kahan 1965, "Pracniques:
Further Remarks on Reducing Truncation Errors".
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


@jax.jit  # its own, because un-jitted operations are not contracted: other last bits
def lerp(average: jax.Array, params: jax.Array, weight: jax.Array) -> jax.Array:
    """One update of the average of one array.

    Args:
        average: the average so far, any shape; float32, float64 or complex.
        params: the live values; same shape and dtype.
        weight: ``1 − decay`` in [0, 1]; a scalar in the (real) dtype of the average.

    Returns:
        ``average`` exactly at weight 0, ``params`` exactly at weight 1, between them otherwise;
        shape and dtype of ``average``. A complex array is two real ones.

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
    # Inf − Inf is NaN, and so is 0 · Inf: the ends are copies, not arithmetic.
    return jnp.where(weight == 0, average, jnp.where(weight == 1, params, mixed))


@jax.jit
def lerp_compensated(
    average: jax.Array, remainder: jax.Array, params: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One update of an average that keeps what rounding takes from it.

        y = remainder + weight · ((params − average) − remainder)
        average' = average + y
        remainder' = y − (average' − average)

    Args:
        average: the average so far, any shape; float32, float64 or complex.
        remainder: what the exact average has beyond it, below its resolution; same shape and dtype.
        params: the live values; same shape and dtype.
        weight: ``1 − decay`` in [0, 1]; a scalar in the (real) dtype of the average.

    Returns:
        Average and remainder: exactly as they were at weight 0, ``params`` and 0 at weight 1.

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
        key: of the random bits of this tensor and update, a uint32 scalar; None rounds to nearest.

    Returns:
        ``average`` exactly at weight 0, ``params`` rounded to nearest at weight 1; else the expected
        value over the keys is that of :func:`lerp`. bfloat16.

    Raises:
        StateError: the whole array is not in sight, inside ``jax.shard_map``.

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
        up = jnp.where(weight == 1, up, by_chance(wide, key))  # a copy is no update
    return jnp.where(weight == 0, average, round_up(wide, up))


def update_weight(
    schedule: Schedule, count: jax.Array, span: int | jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Weight of the update number ``count``: float64 arithmetic, rounded once.

    Float32 arithmetic would be off by 4e-7 in nearly every count, and differ from the weights that
    PyTorch gets from the same schedule.

    Args:
        schedule: what to ask.
        count: number of the update, from 1; a traced or concrete int32 scalar.
        span: steps from one update to the next (``update_every``), static or an int32 scalar.
        dtype: float32 or float64.

    Returns:
        A scalar of that dtype in [0, 1]; what a schedule of the user's own computes from a traced
        count cannot be checked, and is taken as it is.

    Raises:
        ArgumentError: a schedule of the user's own gives a weight outside [0, 1] or NaN, or cannot
            be traced.
        ArgumentTypeError: it gives something other than a number.
    """
    with jax.enable_x64(True):
        if isinstance(span, jax.Array):
            span = span.astype(jnp.float64)  # count · span overflows int32
        weight = _answer(schedule, count.astype(jnp.float64), span)
        return jnp.asarray(weight, jnp.float64).astype(dtype)


def _answer(schedule: Schedule, count: jax.Array, span: int | jax.Array) -> Scalar:
    """The answer of the schedule, checked as far as that is possible while JAX traces it."""
    if is_ours(schedule):
        return schedule.weight(count, span, jnp)
    try:
        weight = ask(schedule, count, span, jnp)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise ArgumentError(
            f"the weight of `{schedule!r:.200}` must be an expression of `xp` (jax.numpy), since JAX"
            f" traces `count`: {str(error).splitlines()[0]}"
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
