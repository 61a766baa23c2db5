"""How far the average is from the live weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ema.torch_backend.memory import CHUNK, real

__all__ = ["relative_distance"]


def relative_distance(averages: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> float:
    """``‖average − params‖₂ / ‖params‖₂`` over all tensors, a chunk at a time.

    Args:
        averages: by name.
        params: the live tensors of the same names.

    Returns:
        0 where they are equal, ∞ where the params are 0 and the average is not.
    """
    difference = norm = 0.0
    for name, average in averages.items():
        ours, theirs = real(average).reshape(-1), real(params[name]).reshape(-1)
        for start in range(0, ours.numel(), CHUNK):
            a = ours[start : start + CHUNK]
            p = theirs[start : start + CHUNK].to(a)
            difference += (a - p).square().sum().item()
            norm += p.square().sum().item()
    if difference == 0.0:
        return 0.0
    return math.sqrt(difference / norm) if norm else math.inf
