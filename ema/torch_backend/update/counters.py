"""Counts of steps and updates."""

from __future__ import annotations

import dataclasses
from itertools import takewhile

from ema.torch_backend.update.guard import DeviceFlag

__all__ = ["Counters"]


@dataclasses.dataclass(frozen=True, slots=True)
class Counters:
    """Counters of one run. They are replaced all at once, so that Ctrl-C never finds half of a change.

    Attributes:
        step: calls of ``update``.
        count: updates made by them.
        skipped: updates that were due and skipped, because live weights held NaN or Inf.
        pending: for each of the last counted updates, a flag that tells whether it was made; only
            the device knows its value so far.
    """

    step: int = 0
    count: int = 0
    skipped: int = 0
    pending: tuple[DeviceFlag, ...] = ()

    def settled(self) -> Counters:
        """The counters with nothing pending; waits for the answers of the device."""
        return self._told(len(self.pending))

    def arrived(self) -> Counters:
        """The counters that include every answer of the device so far, without waiting for it."""
        return self._told(len(list(takewhile(DeviceFlag.has_arrived, self.pending))))

    def _told(self, number: int) -> Counters:
        """The counters with so many pending answers settled."""
        if number == 0:
            return self
        skipped = sum(not flag for flag in self.pending[:number])
        return Counters(
            self.step, self.count - skipped, self.skipped + skipped, self.pending[number:]
        )
