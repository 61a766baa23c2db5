"""Where a case is measured, how large it is there, and the decay of every contender."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

__all__ = ["DECAY", "SIZES", "Setting"]

DECAY = 0.999
SIZES = ("full", "quick", "tiny")
ON_ACCELERATOR = 1_500_000_000
TINY = 4096
SPARE = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One of ``SIZES`` on a device, ``"cpu"`` or ``"cuda"``. Tiny is for tests of the benchmarks."""

    device: str = "cpu"
    size: str = "full"

    @property
    def on_cpu(self) -> bool:
        """Whether the processor does the work, with its own memory."""
        return self.device == "cpu"

    @property
    def finish(self) -> Callable[[], object] | None:
        """Waits for what runs on the device."""
        return None if self.on_cpu else torch.cuda.synchronize

    def elements(self, on_cpu: int, *, copies: int) -> int:
        """How many there are in all tensors: ``on_cpu``, or 1.5 B on an accelerator.

        Fewer where ``copies`` in float32 would not fit into the free memory of the accelerator; an
        eighth in a quick run.
        """
        if self.size == "tiny":
            return TINY
        full = on_cpu if self.on_cpu else min(ON_ACCELERATOR, self.room(copies=copies))
        return full if self.size == "full" else full // 8

    def room(self, *, copies: int) -> int:
        """Elements of which the accelerator's free memory holds so many copies in float32."""
        free, _ = torch.cuda.mem_get_info()
        return int(SPARE * free) // (4 * copies)
