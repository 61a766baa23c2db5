"""How far averages are."""

from __future__ import annotations

import dataclasses

from ema.torch_backend.guard import Flag

__all__ = ["Counters"]


@dataclasses.dataclass(frozen=True, slots=True)
class Counters:
    """Counters of one run, replaced all at once, so that Ctrl-C finds them as they were or will be.

    Attributes:
        step: calls of ``update``.
        count: updates made by them.
        skipped: updates that were due and not made, since the live weights were not finite.
        pending: whether the last update that was counted is made, where only the device knows yet.
    """

    step: int = 0
    count: int = 0
    skipped: int = 0
    pending: Flag | None = None

    def settled(self) -> Counters:
        """With nothing pending: the device is asked, and waited for."""
        if self.pending is None or self.pending:
            return Counters(self.step, self.count, self.skipped)
        return Counters(self.step, self.count - 1, self.skipped + 1)
