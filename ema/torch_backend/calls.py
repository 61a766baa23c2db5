"""Calls that are made as one: a signal, another handler or a compiler cannot split them.

Python runs signal handlers, and so raises ``KeyboardInterrupt``, between two bytecodes.

- :func:`run` and :class:`Progress` make a list of ready-made calls into C. ``deque`` pulls them
  through ``map`` in a single bytecode, so Ctrl-C waits for the last of them. Only one of the calls
  can raise, and then the iterator knows how many were made.
- :func:`uninterrupted` makes Ctrl-C wait for the end of a block of Python code.
- :func:`eager` keeps ``torch.compile`` out of a function.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import call, length_hint
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["Call", "Progress", "eager", "run", "uninterrupted"]

P = ParamSpec("P")
R = TypeVar("R")

Call = Callable[[], Any]
"""A call without arguments, implemented in C, such as a ``partial`` of a tensor method."""


def run(calls: Iterable[Call]) -> None:
    """Make all the calls; a signal is handled before the first or after the last."""
    deque(map(call, calls), maxlen=0)


class Progress:
    """Calls that can each be repeated; :meth:`run` continues after an interruption."""

    def __init__(self, calls: Iterable[Call]) -> None:
        # the last call does nothing: once it is taken, all others were made
        self._calls: list[Call] = [*calls, int]
        self._left = iter(self._calls)

    @property
    def done(self) -> int:
        """How many calls were certainly made: the last one taken may have raised."""
        return max(0, len(self._calls) - length_hint(self._left) - 1)

    @property
    def finished(self) -> bool:
        """Whether all calls were made."""
        return length_hint(self._left) == 0

    def run(self) -> None:
        """Make the calls that are left."""
        self._left.__setstate__(self.done)  # type: ignore[attr-defined]
        run(self._left)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Make Ctrl-C wait for the end of the block, which must be short."""
    handler = signal.getsignal(signal.SIGINT)
    # handlers run in the main thread only, and a handler that C installed must not be replaced
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Keep Dynamo out of ``function`` and of whatever that calls.

    Dynamo would turn NumPy integers into tensors, which cannot be shifted, and would split calls
    that must stay together. ``torch.compiler.disable`` keeps it out, but loads Dynamo, so it is
    applied only once something has been compiled.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # this very line is being traced
            hidden: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return hidden(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapped
