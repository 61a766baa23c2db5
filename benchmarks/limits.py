"""What the machine can do at best, as contenders."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.measure import Contender

__all__ = ["bare_foreach", "flat_copy", "flat_lerp"]

WEIGHT = 0.001


def bare_foreach(model: nn.Module) -> Contender:
    """One ``_foreach_lerp_`` on lists that were made before, without any check."""
    params = [p.detach() for p in model.parameters()]
    averages = [p.clone() for p in params]
    return Contender(
        name="bare foreach",
        call=lambda: torch._foreach_lerp_(averages, params, WEIGHT),
        kind="limit",
    )


def flat_lerp(model: nn.Module) -> Contender:
    """``lerp_`` from one buffer of the size of the model into another."""
    params = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    average = params.clone()
    return Contender(name="flat lerp", call=lambda: average.lerp_(params, WEIGHT), kind="limit")


def flat_copy(model: nn.Module, *, times: int) -> Contender:
    """``copy_`` from one such buffer to another, several times: copy bandwidth."""
    source = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    target = source.clone()

    def copy() -> None:
        for _ in range(times):
            target.copy_(source)

    name = "flat copy" if times == 1 else f"{times} flat copies"
    return Contender(name=name, call=copy, kind="limit")
