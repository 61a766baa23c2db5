"""The equation, as steps on real tensors of one dtype.

    average + weight · (params − average)                    weight < 0.5
    params  − (params − average) · (1 − weight)              otherwise

This is what ``Tensor.lerp_`` computes, on the CPU with a fused multiply-add. Compensated, a
remainder keeps what each update rounds away::

    y = remainder + weight · ((params − average) − remainder)
    average, remainder = average + y, y − ((average + y) − average)

The JAX backend has the same functions in the file of the same name, and they give the same bits.

Sources: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging";
Ruppert 1988, "Efficient Estimations from a Slowly Convergent Robbins-Monro Process"; Kahan 1965,
"Further Remarks on Reducing Truncation Errors".
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ema.torch_backend.calls import Call
from ema.torch_backend.update.rounding import RandomBits, Scratch, round_into

__all__ = ["compensated", "lerp", "narrow"]


def lerp(averages: list[Tensor], params: list[Tensor], weight: float) -> list[Call]:
    """Move each average towards its params by ``weight``, in place.

    Weight 0 leaves the averages and weight 1 copies the params, so that an infinity among them
    does not become NaN.

    Args:
        averages: float32 or float64, contiguous.
        params: as many, of the same shapes, dtype and device.
        weight: ``1 − decay`` of this update, in [0, 1], already of the precision of the averages.

    Returns:
        The calls that do it; empty if no average changes.
    """
    if weight == 0.0:
        return []
    if weight == 1.0:
        return [partial(torch._foreach_copy_, averages, params)]
    return [partial(torch._foreach_lerp_, averages, params, weight)]


def compensated(
    average: Tensor,
    remainder: Tensor,
    params: Tensor,
    weight: float,
    scratch: tuple[Tensor, Tensor],
) -> list[Call]:
    """The same for an average whose exact value is ``average + remainder``.

    Its error stays near one unit in the last place at any decay. Without a remainder, steps of
    less than half a unit are lost.

    Args:
        average: float32 or float64.
        remainder: of its shape and dtype.
        params: likewise.
        weight: as for :func:`lerp`.
        scratch: two tensors, likewise.
    """
    if weight == 0.0:
        return []
    if weight == 1.0:
        return [partial(average.copy_, params), remainder.zero_]
    y, total = scratch
    return [
        partial(torch.sub, params, average, out=y),
        partial(y.sub_, remainder),
        partial(torch.add, remainder, y, alpha=weight, out=y),  # a fused multiply-add
        partial(torch.add, average, y, out=total),
        partial(torch.sub, total, average, out=remainder),
        partial(torch.sub, y, remainder, out=remainder),
        partial(average.copy_, total),
    ]


def narrow(
    average: Tensor,
    params: Tensor,
    weight: float,
    *,
    count: int,
    bits: RandomBits | None,
    scratch: Scratch,
) -> list[Call]:
    """The same in float32 for a bfloat16 average, which is rounded at the end.

    Args:
        average: bfloat16, flat.
        params: float32, of the same shape.
        weight: as for :func:`lerp`; 1 copies, rounded to nearest.
        count: number of the update.
        bits: for stochastic rounding; None rounds to nearest.
        scratch: of as many elements.
    """
    if weight == 0.0:
        return []
    if weight == 1.0:
        return [partial(average.copy_, params)]
    steps: list[Call] = [partial(scratch.wide.copy_, average)]
    steps += lerp([scratch.wide], [params], weight)
    if bits is None:
        return [*steps, partial(average.copy_, scratch.wide)]
    return [*steps, *round_into(average, scratch.wide, bits.seed(scratch, count), scratch)]
