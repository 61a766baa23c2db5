"""The random bits of stochastic rounding: a function of the element, not of time or place.

A bfloat16 average rounds ``x`` to one of its two neighbors, up with the probability of the fraction
that is cut off, so that the expected value is ``x`` and steps far below the resolution add up. The
bits decide alike in both frameworks, in a resumed run and on any number of ranks, since they are a
hash of a counter and not the state of a generator::

    key   = mix(mix(count ⊕ low) ⊕ high)          (high, low) = xxh3_64(name, seed)
    bits  = mix(index ⊕ key) >> 16                 16 of them, uniform
    float32 with bits b  →  b + bits, the low 16 of the sum cut off

``count`` is the number of the update (1, 2, …) and ``index`` the place of the element in its whole
tensor, row by row; both are taken modulo 2³². ``mix`` is a bijection of 32-bit integers.

Each backend has this arithmetic in a file of the same name; here it is on Python numbers.

Sources: Wellons 2018, "Prospecting for Hash Functions" (lowbias32); Connolly, Higham and Mary 2021,
"Stochastic Rounding and Its Probabilistic Backward Error Analysis".
"""

from __future__ import annotations

from typing import NamedTuple

import xxhash

__all__ = ["FIRST", "SECOND", "Stream", "key_of", "mix", "stream_of"]

FIRST, SECOND = 0x7FEB352D, 0x846CA68B
"""The odd multipliers of lowbias32."""

_MASK = 0xFFFFFFFF


class Stream(NamedTuple):
    """Two halves of a hash, 32 bits each, that give each tensor random bits of its own."""

    low: int
    high: int


def stream_of(name: str, seed: int) -> Stream:
    """The stream of the tensor with this canonical name."""
    value = xxhash.xxh3_64_intdigest(name.encode(errors="surrogatepass"), seed=seed)
    return Stream(value & _MASK, value >> 32)


def mix(x: int) -> int:
    """lowbias32: 32 bits in, 32 well-mixed bits out, one to one."""
    x ^= x >> 16
    x = x * FIRST & _MASK
    x ^= x >> 15
    x = x * SECOND & _MASK
    return x ^ x >> 16


def key_of(stream: Stream, count: int) -> int:
    """The key of update number ``count``, the same for all elements of a tensor."""
    return mix(mix((count & _MASK) ^ stream.low) ^ stream.high)
