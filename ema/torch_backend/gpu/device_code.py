"""Triton code that runs on the GPU: each kernel processes many tensors in one pass.

Only :mod:`ema.torch_backend.gpu.kernels` imports this module, when there is a GPU to compile for.
:mod:`ema.torch_backend.gpu.grid` makes the tables and blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ema.rounding import FIRST, SECOND

__all__ = ["exchange", "look", "update"]

_FIRST = tl.constexpr(FIRST)
_SECOND = tl.constexpr(SECOND)


@triton.jit
def mix(x):
    """The bijection :func:`ema.rounding.mix` on uint32."""
    x ^= x >> 16
    x *= tl.full((), _FIRST, tl.uint32)
    x ^= x >> 15
    x *= tl.full((), _SECOND, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def lerp(average, params, weight):
    """Compute :mod:`ema.torch_backend.update.equation` with the same fused multiply-adds."""
    difference = params - average
    near = tl.fma(weight, difference, average)
    far = tl.fma(weight - 1.0, difference, params)
    return tl.where(weight < 0.5, near, far)


@triton.jit
def widen(x):
    """Convert to float32. bfloat16 is loaded as bits, so that Triton's interpreter is exact."""
    if x.dtype == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def to_nearest(bits):
    """The summand for the bits of a float32 before the low 16 are cut off, to round ties to even."""
    return 0x7FFF + ((bits >> 16) & 1)


@triton.jit
def narrow(x, bits, added):
    """The bits of the bfloat16, rounded by ``added``; a carry must not turn NaN into a number."""
    return tl.where(x == x, (bits + added) >> 16, (bits >> 16) | 0x40).to(tl.uint16)


@triton.jit
def begin(blocks, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Offset in the table of the row for this program's block, and the block's first element."""
    block = blocks + 2 * tl.program_id(0)
    return tl.load(block).to(tl.int64) * COLUMNS, tl.load(block + 1).to(tl.int64) * BLOCK


@triton.jit
def pointer(address, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Pointer to the tensor whose address is stored in a table."""
    tensor = tl.load(address).to(tl.pointer_type(DTYPE))
    if WHOLE:
        tensor = tl.multiple_of(tensor, 16)
    return tensor


@triton.jit
def look(
    table,
    blocks,
    finite,
    PARAMS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write 0 to ``finite`` if an element of this block is NaN or infinite."""
    offset, start = begin(blocks, 2, BLOCK)
    row = table + offset
    params = pointer(row, PARAMS, WHOLE) + start
    lanes = tl.arange(0, BLOCK)
    inside = None if WHOLE else start + lanes < tl.load(row + 1)
    values = tl.load(params + lanes, mask=inside, other=None if WHOLE else 0)
    if PARAMS == tl.float64:
        wrong = values - values != 0.0
    else:
        x = widen(values)
        wrong = x - x != 0.0  # x − x is 0 for finite x, and NaN for NaN and infinities
    tl.store(finite + lanes * 0, 0, mask=wrong)


@triton.jit
def exchange(
    table,
    blocks,
    ELEMENT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Exchange one block between two tensors of the same length, as integers of their size."""
    offset, start = begin(blocks, 3, BLOCK)
    row = table + offset
    one = pointer(row, ELEMENT, WHOLE) + start
    other = pointer(row + 1, ELEMENT, WHOLE) + start
    lanes = tl.arange(0, BLOCK)
    inside = None if WHOLE else start + lanes < tl.load(row + 2)
    x = tl.load(one + lanes, mask=inside)
    y = tl.load(other + lanes, mask=inside)
    tl.store(one + lanes, y, mask=inside)
    tl.store(other + lanes, x, mask=inside)


@triton.jit(do_not_specialize=["count"])
def update(
    table,
    blocks,
    weight,
    count,
    finite,
    AVERAGE: tl.constexpr,
    PARAMS: tl.constexpr,
    COMPENSATED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GUARDED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one block; :class:`ema.torch_backend.gpu.kernels.Fused` describes the arguments."""
    if GUARDED:
        if tl.load(finite) == 0:
            return
    offset, start = begin(blocks, 7, BLOCK)
    row = table + offset
    lanes = tl.arange(0, BLOCK)
    inside = None if WHOLE else start + lanes < tl.load(row + 3)
    averages = pointer(row, AVERAGE, WHOLE) + start + lanes
    average = widen(tl.load(averages, mask=inside))
    live = widen(tl.load(pointer(row + 1, PARAMS, WHOLE) + start + lanes, mask=inside))
    if COMPENSATED:
        remainders = pointer(row + 2, tl.float32, WHOLE) + start + lanes
        remainder = tl.load(remainders, mask=inside)
        step = tl.fma(weight, (live - average) - remainder, remainder)
        moved = average + step
        remainder = step - (moved - average)
        tl.store(remainders, tl.where(weight == 1.0, 0.0, remainder), mask=inside)
    else:
        moved = lerp(average, live, weight)
    moved = tl.where(weight == 1.0, live, moved)  # Inf − Inf would be NaN
    if AVERAGE == tl.float32:
        tl.store(averages, moved, mask=inside)
    else:
        bits = moved.to(tl.uint32, bitcast=True)
        added = to_nearest(bits)
        if STOCHASTIC:
            low = tl.load(row + 4).to(tl.uint32)
            high = tl.load(row + 5).to(tl.uint32)
            key = mix(mix(count.to(tl.uint32) ^ low) ^ high)
            place = (tl.load(row + 6) + start).to(tl.uint32) + lanes.to(tl.uint32)
            added = tl.where(weight == 1.0, added, mix(place ^ key) >> 16)
        tl.store(averages, narrow(moved, bits, added), mask=inside)
