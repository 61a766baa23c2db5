"""What the machine can do at best, as contenders."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.measure import Contender
from benchmarks.setting import DECAY, Setting

__all__ = ["Flat", "bare_foreach"]

WEIGHT = 1 - DECAY


def bare_foreach(model: nn.Module) -> Contender:
    """One ``_foreach_lerp_`` on lists that were made before, without any check."""
    params = [p.detach() for p in model.parameters()]
    averages = [p.clone() for p in params]
    return Contender(
        name="bare foreach",
        call=lambda: torch._foreach_lerp_(averages, params, WEIGHT),
        kind="limit",
    )


class Flat:
    """Two buffers of the size of the model."""

    def __init__(self, elements: int, setting: Setting, dtype: torch.dtype = torch.float32) -> None:
        self.params = torch.randn(elements, device=setting.device, dtype=dtype)
        self.average = self.params.clone()

    def lerp(self, name: str = "flat lerp") -> Contender:
        """``lerp_`` from one into the other: reads both, writes one."""
        return Contender(
            name=name,
            call=lambda: self.average.lerp_(self.params, WEIGHT),
            kind="limit",
            traffic=3 * self.params.nbytes,
        )

    def copy(self, *, times: int = 1) -> Contender:
        """``copy_`` from one into the other: copy bandwidth, reading and writing."""

        def copy() -> None:
            for _ in range(times):
                self.average.copy_(self.params)

        return Contender(
            name="flat copy" if times == 1 else f"{times} flat copies",
            call=copy,
            kind="limit",
            traffic=2 * times * self.params.nbytes,
        )
