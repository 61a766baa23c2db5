"""What runs on the GPU: one update of many tensors in one pass over their memory, in Triton.

Only :mod:`ema.torch_backend.gpu.kernels` imports this, once there is a GPU to compile it for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ema.rounding import FIRST, SECOND

__all__ = ["update"]

_FIRST = tl.constexpr(FIRST)
_SECOND = tl.constexpr(SECOND)


@triton.jit
def mix(x):
    """The bijection of :func:`ema.rounding.mix`, of uint32."""
    x ^= x >> 16
    x *= tl.full((), _FIRST, tl.uint32)
    x ^= x >> 15
    x *= tl.full((), _SECOND, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def lerp(average, params, weight):
    """The equation of :mod:`ema.torch_backend.update`, with the same fused multiply-adds."""
    difference = params - average
    near = tl.fma(weight, difference, average)
    far = tl.fma(weight - 1.0, difference, params)
    return tl.where(weight < 0.5, near, far)


@triton.jit
def widen(x):
    """float32 of what was loaded; bfloat16 comes as its bits, for an interpreter to be exact."""
    if x.dtype == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def to_nearest(bits):
    """What to add to the bits of a float32 before the low 16 are cut off: ties to even."""
    return 0x7FFF + ((bits >> 16) & 1)


@triton.jit
def narrow(x, bits, added):
    """The bits of a bfloat16; a carry must not turn NaN into a number."""
    return tl.where(x == x, (bits + added) >> 16, (bits >> 16) | 0x40).to(tl.uint16)


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
    ON_DEVICE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one tensor, see :class:`ema.torch_backend.gpu.kernels.Fused` for the arguments."""
    if GUARDED:
        if tl.load(finite) == 0:
            return
    if ON_DEVICE:
        weight = tl.load(weight).to(tl.float32)
        count = tl.load(count)
        if weight == 0.0:
            return
    program = tl.program_id(0)
    row = table + tl.load(blocks + 2 * program).to(tl.int64) * 7
    start = tl.load(blocks + 2 * program + 1).to(tl.int64) * BLOCK
    averages = tl.load(row).to(tl.pointer_type(AVERAGE))
    params = tl.load(row + 1).to(tl.pointer_type(PARAMS))
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        averages = tl.multiple_of(averages, 16)
        params = tl.multiple_of(params, 16)
        inside = None
    else:
        inside = start + lanes < tl.load(row + 3)
    averages += start + lanes
    average = widen(tl.load(averages, mask=inside))
    live = widen(tl.load(params + start + lanes, mask=inside))
    if COMPENSATED:
        remainders = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        if WHOLE:
            remainders = tl.multiple_of(remainders, 16)
        remainders += start + lanes
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
