"""The distance between the average and the live weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ema.torch_backend.tensors.memory import CHUNK, real
from ema.torch_backend.tensors.sharding import counts_here, is_sharded, local_of

__all__ = ["relative_distance"]


def relative_distance(averages: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> float:
    """``‖average − params‖₂ / ‖params‖₂`` over all tensors, a chunk at a time.

    Each rank adds its part of sharded tensors; this communicates two numbers for each mesh.

    Args:
        averages: by name.
        params: the live tensors of the same names.

    Returns:
        0 where they are equal, ∞ where the params are 0 and the average is not.
    """
    difference = norm = 0.0
    shared: dict[Any, list[float]] = {}  # by mesh, over its ranks
    for name, average in averages.items():
        live = params[name]
        squares = _squares(average, local_of(live))
        if not is_sharded(live):
            difference, norm = difference + squares[0], norm + squares[1]
            continue
        sums = shared.setdefault(_mesh(live), [0.0, 0.0])
        if counts_here(live):
            sums[:] = sums[0] + squares[0], sums[1] + squares[1]
    for mesh, sums in shared.items():
        total = _sum_over(mesh, sums)
        difference, norm = difference + total[0], norm + total[1]
    if difference == 0.0:
        return 0.0
    return math.sqrt(difference / norm) if norm else math.inf


def _squares(average: Tensor, live: Tensor) -> tuple[float, float]:
    difference = norm = 0.0
    ours, theirs = real(average).reshape(-1), real(live).reshape(-1)
    for start in range(0, ours.numel(), CHUNK):
        a = ours[start : start + CHUNK]
        p = theirs[start : start + CHUNK].to(a)
        difference += (a - p).square().sum().item()
        norm += p.square().sum().item()
    return difference, norm


def _mesh(live: Any) -> Any:
    return live.device_mesh


def _sum_over(mesh: Any, sums: list[float]) -> list[float]:
    total = torch.tensor(sums, dtype=torch.float64, device=mesh.device_type)
    for axis in range(mesh.ndim):
        torch.distributed.all_reduce(total, group=mesh.get_group(axis))
    result: list[float] = total.tolist()
    return result
