"""The arithmetic of ``ema.rounding`` on traced arrays: the same bits, one fused loop.

    up    = mix(index ⊕ key) >> 16                at random
          = 0x7fff + the last bit that stays       to nearest, ties to even
    float32 with bits b  →  b + up, the low 16 of the sum cut off

All numbers are uint32, which wrap and shift in zeros like Python's integers under a mask. No
float32 is converted to bfloat16, because XLA treats a conversion there and back as the identity.
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

_QUIET = 0x0040  # this bit keeps a NaN a NaN when its low half is cut off


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
    """The key (a uint32 scalar) of update number ``count`` (an int32 scalar)."""
    low, high = jnp.uint32(stream.low), jnp.uint32(stream.high)
    return mix(mix(count.astype(jnp.uint32) ^ low) ^ high)


def by_chance(like: jax.Array, key: jax.Array) -> jax.Array:
    """Random numbers to add to the bits of each element, uniform in [0, 2**16).

    Args:
        like: an array with the wanted shape and sharding; its values do not matter.
        key: the key of the tensor and the update, a uint32 scalar.

    Returns:
        A uint32 array of that shape. The number of an element depends on its place in the whole
        array, not on its device.

    Raises:
        StateError: ``like`` is one device's part of an array, inside ``jax.shard_map``.
    """
    if axes := varying(like):
        raise StateError(
            "a bfloat16 average cannot be rounded inside jax.shard_map where its parameter is split"
            f" over {', '.join(map(repr, sorted(axes)))}: the random bits of an element depend on"
            " its place in the whole array, which is not known there; update outside, in jax.jit"
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
    """Numbers (uint32) to add to the bits of float32 to round to nearest, ties to even."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    up: jax.Array = jnp.uint32(0x7FFF) + (_right(bits, 16) & jnp.uint32(1))
    return up


@jax.custom_jvp
def round_up(x: jax.Array, up: jax.Array) -> jax.Array:
    """Round float32 to bfloat16: add ``up`` to the bits and keep the upper half; NaN stays NaN.

    With random ``up`` the expected value is ``x`` itself, so a derivative passes through.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    half = jnp.where(jnp.isnan(x), _right(bits, 16) | jnp.uint32(_QUIET), _right(bits + up, 16))
    return lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.bfloat16)


@round_up.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return round_up(*primals), tangents[0].astype(jnp.bfloat16)
