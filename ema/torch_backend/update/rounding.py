"""Stochastic rounding to bfloat16, a chunk at a time; :mod:`ema.rounding` gives the method.

The hash is defined on unsigned 32-bit integers. PyTorch computes it with int32: products wrap, and the
sign bits that a right shift brings in are masked. Its first step, ``x ⊕ (x >> 16)``, distributes over
⊕. So it is applied to the two parts of ``index ⊕ key`` apart: to the indices once, to the key on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ema.rounding import FIRST, SECOND, Stream, key_of
from ema.torch_backend.calls import Call
from ema.torch_backend.tensors.sharding import Box

__all__ = ["GatheredBits", "Indices", "RandomBits", "Scratch", "StretchBits", "round_into"]

_LARGEST = torch.finfo(torch.float32).max


class Indices(NamedTuple):
    """Row-major indices, in the whole tensor, of elements in the order of their memory.

    Attributes:
        offset: index of the first element.
        sizes: of the dimensions in the order of memory, the outermost first. Dimensions of size 1
            are left out, and neighbors with one common stride are joined.
        strides: of the same dimensions, by which the index grows.
    """

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, local: Tensor, place: Box) -> Indices:
        """The indices of a dense tensor, in any order of dimensions, that lies at ``place``."""
        row_major = [math.prod(place.shape[dim + 1 :]) for dim in range(len(place.shape))]
        offset = sum(i * stride for i, stride in zip(place.offsets, row_major, strict=True))
        sizes: list[int] = []
        strides: list[int] = []
        dims = sorted(zip(local.stride(), local.shape, row_major, strict=True), reverse=True)
        for _, size, stride in dims:
            if size == 1:
                continue
            if strides and strides[-1] == size * stride:
                sizes[-1] *= size
                strides[-1] = stride
            else:
                sizes.append(size)
                strides.append(stride)
        return cls(offset, tuple(sizes), tuple(strides))

    @property
    def consecutive(self) -> bool:
        """Whether they grow by 1."""
        return self.strides in {(), (1,)}

    def stretch(self, start: int, size: int, device: torch.device) -> Tensor:
        """The indices of ``size`` elements from ``start`` on, modulo 2³², as int32."""
        at = torch.arange(start, start + size, device=device)
        index = torch.full_like(at, self.offset)
        for length, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            index.add_(at.remainder(length), alpha=stride)
            at = at.div(length, rounding_mode="floor")
        return index.to(torch.int32)


class Scratch(NamedTuple):
    """Memory that rounding a chunk needs, of as many elements.

    Attributes:
        numbers: 0, 1, 2, …; int32.
        folded: the same after the first step of the hash.
        bits: int32.
        spare: int32.
        wide: float32, for the average.
    """

    numbers: Tensor
    folded: Tensor
    bits: Tensor
    spare: Tensor
    wide: Tensor

    @classmethod
    def allocate(cls, size: int, device: torch.device) -> Scratch:
        """Scratch for chunks of up to ``size`` elements."""
        numbers = torch.arange(size, dtype=torch.int32, device=device)
        return cls(
            numbers,
            _folded(numbers),
            torch.empty(size, dtype=torch.int32, device=device),
            torch.empty(size, dtype=torch.int32, device=device),
            torch.empty(size, dtype=torch.float32, device=device),
        )

    def first(self, size: int) -> Scratch:
        """The part of it for a chunk of ``size`` elements."""
        return Scratch(*(tensor[:size] for tensor in self))


class StretchBits(NamedTuple):
    """The random bits of a stretch of one tensor's memory.

    Attributes:
        stream: of the tensor.
        indices: of all its elements.
        start: of the stretch, in elements.
    """

    stream: Stream
    indices: Indices
    start: int

    def seed(self, scratch: Scratch, count: int) -> list[Call]:
        """Leave ``index ⊕ key`` in ``scratch.bits``, after the first step of the hash."""
        bits = scratch.bits
        key = key_of(self.stream, count)
        begin = (self.indices.offset + self.start) & 0xFFFFFFFF
        if self.indices.consecutive and begin % (1 << (len(bits) - 1).bit_length()) == 0:
            # no carry: begin + counter = begin ⊕ counter
            both = _signed(_fold(begin ^ key))
            return [partial(torch.bitwise_xor, scratch.folded, both, out=bits)]
        if self.indices.consecutive:
            return [
                partial(torch.add, scratch.numbers, _signed(begin), out=bits),
                partial(bits.bitwise_xor_, _signed(key)),
                *_folding(scratch),
            ]
        index = _folded(self.indices.stretch(self.start, len(bits), bits.device))
        return [partial(torch.bitwise_xor, index, _signed(_fold(key)), out=bits)]


class GatheredBits:
    """The random bits of small tensors whose averages lie side by side, each in row-major order.

    Args:
        runs: of each tensor.
        device: of the averages.
    """

    def __init__(self, runs: Sequence[StretchBits], device: torch.device) -> None:
        self._low, self._high = np.array([each.stream for each in runs], np.uint32).T.copy()
        self._lengths = np.array([math.prod(each.indices.sizes) for each in runs])
        offsets = np.array([each.indices.offset for each in runs])
        self._begins = (offsets - np.cumsum([0, *self._lengths[:-1]])).astype(np.uint32)
        self._device = device

    def seed(self, scratch: Scratch, count: int) -> list[Call]:
        """Leave ``index ⊕ key`` in ``scratch.bits``, after the first step of the hash."""
        numbers, bits = scratch.numbers, scratch.bits
        keys = _mixed(_mixed(np.uint32(count & 0xFFFFFFFF) ^ self._low) ^ self._high)
        return [
            partial(torch.add, numbers, self._spread(self._begins), out=bits),
            partial(bits.bitwise_xor_, self._spread(keys)),
            *_folding(scratch),
        ]

    def _spread(self, values: np.ndarray[Any, np.dtype[np.uint32]]) -> Tensor:
        """Repeat the value of each tensor for each element; NumPy takes a tenth of PyTorch's time."""
        return torch.from_numpy(np.repeat(values.view(np.int32), self._lengths)).to(self._device)


RandomBits = StretchBits | GatheredBits


def round_into(average: Tensor, exact: Tensor, seed: list[Call], scratch: Scratch) -> list[Call]:
    """Steps that round ``exact`` into ``average``, up or down by chance.

    Args:
        average: bfloat16, flat.
        exact: float32, of as many elements; it is overwritten.
        seed: steps that leave ``index ⊕ key`` in ``scratch.bits``, after the first step of the hash.
        scratch: of as many elements.
    """
    bits, spare = scratch.bits, scratch.spare
    rounded, nan = bits.view(torch.float32), spare.view(torch.float32)
    return [
        *seed,
        partial(bits.mul_, _signed(FIRST)),
        partial(torch.bitwise_right_shift, bits, 15, out=spare),
        partial(spare.bitwise_and_, 0x1FFFF),
        partial(bits.bitwise_xor_, spare),
        partial(bits.mul_, _signed(SECOND)),
        partial(bits.bitwise_right_shift_, 16),
        partial(bits.bitwise_and_, 0xFFFF),
        partial(bits.add_, exact.view(torch.int32)),
        partial(bits.bitwise_and_, -0x10000),
        # the sum may carry a NaN into another number: subtract NaN from these, 0 from the others
        partial(torch.clamp, exact, -_LARGEST, _LARGEST, out=nan),
        partial(nan.sub_, nan),
        partial(rounded.sub_, nan),
        partial(average.copy_, rounded),
    ]


def _fold(x: int) -> int:
    """The first step of the hash."""
    return x ^ x >> 16


def _folded(x: Tensor) -> Tensor:
    """The first step of the hash of each element of an int32 tensor."""
    return x.bitwise_xor(x.bitwise_right_shift(16).bitwise_and_(0xFFFF))


def _folding(scratch: Scratch) -> list[Call]:
    """The first step of the hash of ``scratch.bits``, in place."""
    bits, spare = scratch.bits, scratch.spare
    return [
        partial(torch.bitwise_right_shift, bits, 16, out=spare),
        partial(spare.bitwise_and_, 0xFFFF),
        partial(bits.bitwise_xor_, spare),
    ]


def _signed(value: int) -> int:
    """The int32 with the bits of ``value`` modulo 2³²."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _mixed(x: np.ndarray[Any, np.dtype[np.uint32]]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """``ema.rounding.mix`` of an array of uint32."""
    x = x ^ x >> np.uint32(16)
    x = x * np.uint32(FIRST)
    x = x ^ x >> np.uint32(15)
    x = x * np.uint32(SECOND)
    x ^= x >> np.uint32(16)
    return x
