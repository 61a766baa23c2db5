"""Steps that nothing can part: lists of calls into C, run from C.

Python runs signal handlers, and so raises ``KeyboardInterrupt``, between two bytecodes. A list of
ready-made calls that ``deque`` pulls through ``map`` is a single bytecode: Ctrl-C waits for its
end. What remains is an exception from one of the calls themselves, and there the iterator knows
how many were made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from operator import call, length_hint
from typing import Any

__all__ = ["Progress", "Step", "run"]

Step = Callable[[], Any]
"""A call without arguments that is implemented in C, such as a ``partial`` of a tensor method."""


def run(steps: Iterable[Step]) -> None:
    """Make all the calls; a signal is handled before the first or after the last."""
    deque(map(call, steps), maxlen=0)


class Progress:
    """Steps that can each be repeated, and that go on where they were interrupted."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self._steps: list[Step] = [
            *steps,
            int,
        ]  # int() does nothing: once it is taken, all others were made
        self._left = iter(self._steps)

    @property
    def done(self) -> int:
        """Steps that were made for certain: the last one taken may have raised."""
        return max(0, len(self._steps) - length_hint(self._left) - 1)

    @property
    def finished(self) -> bool:
        """Whether all of them were made."""
        return length_hint(self._left) == 0

    def run(self) -> None:
        """Make the steps that are left."""
        self._left.__setstate__(self.done)  # type: ignore[attr-defined]
        run(self._left)
