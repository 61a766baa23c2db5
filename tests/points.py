"""Points of a running program, counted: where a test acts does not depend on the machine's speed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

__all__ = ["Points", "kill_at"]


class Points:
    """Within the block, count the points that this thread passes in functions that begin there.

    Args:
        act: called at each point with its number, from 0.
        lines: whether each line is a point, or only each call of a Python function, which is faster.

    Attributes:
        passed: the number of points so far.
    """

    def __init__(self, act: Callable[[int], object] | None = None, *, lines: bool = True) -> None:
        self.passed = 0
        self._act, self._lines = act, lines

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        self._pass()
        return self._on_line if self._lines else None

    def _on_line(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        if event == "line":
            self._pass()
        return self._on_line

    def _pass(self) -> None:
        number = self.passed
        self.passed += 1
        if self._act is not None:
            self._act(number)


def kill_at(point: int) -> Callable[[int], None]:
    """What kills this process at the point of that number: SIGKILL, as the system does it."""

    def act(number: int) -> None:
        if number == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return act
