"""How far averages are."""

from __future__ import annotations

import dataclasses
from itertools import takewhile

from ema.torch_backend.update.guard import DeviceFlag

__all__ = ["Counters"]


@dataclasses.dataclass(frozen=True, slots=True)
class Counters:
    """Counters of one run, replaced all at once, so that Ctrl-C finds them as they were or will be.

    Attributes:
        step: calls of ``update``.
        count: updates made by them.
        skipped: updates that were due and not made, since the live weights were not finite.
        pending: for each of the last updates that were counted, whether it is made, where only
            the device knows yet.
    """

    step: int = 0
    count: int = 0
    skipped: int = 0
    pending: tuple[DeviceFlag, ...] = ()

    def settled(self) -> Counters:
        """With nothing pending: the device is asked, and waited for."""
        return self._told(len(self.pending))

    def arrived(self) -> Counters:
        """The counters that include every answer of the device so far, without waiting for it."""
        return self._told(len(list(takewhile(DeviceFlag.has_arrived, self.pending))))

    def _told(self, number: int) -> Counters:
        """With so many of those pending settled."""
        if number == 0:
            return self
        skipped = sum(not flag for flag in self.pending[:number])
        return Counters(
            self.step, self.count - skipped, self.skipped + skipped, self.pending[number:]
        )
