"""The arithmetic of ``ema.rounding`` on traced arrays: the same bits, one fused loop.

    up    = mix(index ⊕ key) >> 16                by chance
          = 0x7fff + the last bit that stays       to nearest, ties to even
    float32 with bits b  →  b + up, the low 16 of the sum cut off

All of it is on uint32, which wraps and shifts in zeros as the Python numbers do under their mask.
Nothing is converted from float32 to bfloat16, since XLA takes a conversion there and back for the
identity.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ema.errors import StateError
from ema.jax_backend.update.manual import varying
from ema.rounding import FIRST, SECOND, Stream

__all__ = ["by_chance", "key_of", "mix", "round_up", "to_nearest"]

_QUIET = 0x0040  # the bit of a NaN that keeps it one when its low half is cut off


def mix(x: jax.Array) -> jax.Array:
    """lowbias32 of each element; uint32, any shape."""
    x = x ^ _right(x, 16)
    x = x * jnp.uint32(FIRST)
    x = x ^ _right(x, 15)
    x = x * jnp.uint32(SECOND)
    return x ^ _right(x, 16)


def _right(x: jax.Array, places: int) -> jax.Array:
    return lax.shift_right_logical(x, jnp.full_like(x, places))


def key_of(stream: Stream, count: jax.Array) -> jax.Array:
    """The key of update number ``count``, an int32 scalar: a uint32 scalar."""
    low, high = jnp.uint32(stream.low), jnp.uint32(stream.high)
    return mix(mix(count.astype(jnp.uint32) ^ low) ^ high)


def by_chance(like: jax.Array, key: jax.Array) -> jax.Array:
    """Random summands for the bits of each element, uniform in [0, 2**16).

    Args:
        like: an array of the shape and the sharding; its values do not matter.
        key: of the tensor and the update, a uint32 scalar.

    Returns:
        uint32 of that shape. An element's is that of its place in the whole array, whatever device
        it is on.

    Raises:
        StateError: ``like`` is one device's part of an array, inside ``jax.shard_map``.
    """
    if axes := varying(like):
        raise StateError(
            "a bfloat16 average cannot be rounded inside jax.shard_map where its parameter is split"
            f" over {', '.join(map(repr, sorted(axes)))}: the chance of an element depends on its"
            " place in the whole array, which is not known there; update outside, in jax.jit"
        )
    index = jnp.zeros((), jnp.uint32)
    stride = 1
    for dimension in reversed(range(like.ndim)):
        place = lax.broadcasted_iota(
            jnp.uint32, like.shape, dimension, out_sharding=jax.typeof(like).sharding
        )
        index += place * jnp.uint32(stride % (1 << 32))
        stride *= like.shape[dimension]
    return _right(mix(index ^ key), 16)


def to_nearest(x: jax.Array) -> jax.Array:
    """Summands for the bits of float32 numbers that round them to nearest, ties to even; uint32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    up: jax.Array = jnp.uint32(0x7FFF) + (_right(bits, 16) & jnp.uint32(1))
    return up


@jax.custom_jvp
def round_up(x: jax.Array, up: jax.Array) -> jax.Array:
    """float32 to bfloat16: its upper half, after ``up`` was added to its bits; NaN stays NaN.

    By chance the expected value is ``x`` itself, so that a derivative passes through.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    half = jnp.where(jnp.isnan(x), _right(bits, 16) | jnp.uint32(_QUIET), _right(bits + up, 16))
    return lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.bfloat16)


@round_up.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return round_up(*primals), tangents[0].astype(jnp.bfloat16)
