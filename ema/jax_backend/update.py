"""The equation: one step of an exponential moving average.

    average + weight · (params − average)                       weight < 0.5
    params  − (params − average) · (1 − weight)                 otherwise

``ema/torch_backend/update.py`` is the same page for PyTorch; the two agree to the last bit.
Here it is written out in the form that XLA contracts to the same fused multiply-add as
``torch.Tensor.lerp_``. Each branch subtracts the smaller correction, and ``weight = 1 − decay`` is
the primitive: ``decay · average + (1 − decay) · params`` is wrong by 1e-3 at decay 0.99999.

Sources: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; Ruppert
1988, "Efficient Estimations from a Slowly Convergent Robbins-Monro Process".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from ema.schedules import Schedule

__all__ = ["lerp", "update_weight"]


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
        A scalar of that dtype in [0, 1].
    """
    with jax.enable_x64(True):
        if isinstance(span, jax.Array):
            span = span.astype(jnp.float64)  # count · span overflows int32
        weight = schedule.weight(count.astype(jnp.float64), span, jnp)
        return jnp.asarray(weight, jnp.float64).astype(dtype)
