"""One thread at a time: a call that overlaps another thread's call is refused.

Threads may use an object in turn, and a call may make further calls of the same object: a hook of
the model, a schedule of the user's own, a signal handler.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from ema.errors import StateError

__all__ = ["Turns", "in_eager_turn", "in_turn"]

_THREAD = "thread"


class Turns:
    """The thread that uses an object now, and the calls that are due before the next one may use it.

    A turn is an entry in a dict: ``setdefault`` looks and writes in one step, and an entry can be
    deleted by its own thread as often as it likes. So a call that does both in a ``finally`` of
    its own, one inside the other, leaves the turn free wherever Ctrl-C comes.

    Attributes:
        number: counts the turns; calls within a call belong to the turn of the outermost one.
        taken: the thread that is within a call, if any.
        due: calls to make as soon as no call runs.
    """

    def __init__(self) -> None:
        self.number = 0
        self.taken: dict[str, int] = {}
        self.due: deque[Callable[[], object]] = deque()

    def mine(self) -> bool:
        """Whether this thread is within a call."""
        return self.taken.get(_THREAD) == get_ident()

    def finish(self, ending: Callable[[], object], since: int) -> bool:
        """Call ``ending`` now, or at the end of the call that runs; it is never lost.

        Args:
            ending: may be called twice.
            since: number of the turn in which its beginning was made. Within the same turn the
                ending comes now; a turn that began later goes on undisturbed.

        Returns:
            Whether the call that runs is another thread's.
        """
        if self.mine() and self.number == since:
            ending()
            return False
        self.due.append(ending)
        return not (self.mine() or self.catch_up())

    def catch_up(self) -> bool:
        """Make the calls that are due, or leave them to the thread that is within a call.

        Returns:
            Whether no other thread is within a call.
        """
        me = get_ident()
        free = False
        try:
            try:
                free = self.taken.setdefault(_THREAD, me) == me
                if free:
                    self._do_due()
            finally:
                self._release()
        finally:
            self._release()
        return free

    def _do_due(self) -> None:
        while self.due:
            try:
                self.due[0]()
            except Exception:
                self.due.popleft()
                raise
            self.due.popleft()  # after Ctrl-C it is still there, and is done again

    def _release(self) -> None:
        if self.mine():
            del self.taken[_THREAD]


class _UsedInTurn(Protocol):
    _turns: Turns


P = ParamSpec("P")
R = TypeVar("R")
Self = TypeVar("Self", bound=_UsedInTurn)


def in_turn(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """Refuse a call of ``method`` that overlaps a call by another thread, with a ``StateError``.

    It works in compiled code too. Dynamo assumes a single thread, so it does not trace these lines;
    it does trace ``method``.
    """
    taking = in_eager_turn(method)

    @functools.wraps(method)
    def call(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # this very line is being traced
            hidden: Callable[Concatenate[Self, P], R]
            hidden = torch.compiler.disable(taking, recursive=False)  # type: ignore[no-untyped-call]
            return hidden(self, *args, **kwargs)
        return taking(self, *args, **kwargs)

    return call


def in_eager_turn(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """The same for a method that is :func:`~ema.torch_backend.calls.eager` besides."""
    name = method.__name__.strip("_")

    @functools.wraps(method)
    def call(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        turns = self._turns
        taken = turns.taken
        me = get_ident()
        if taken.get(_THREAD) == me:
            return method(self, *args, **kwargs)
        try:
            try:
                if taken.setdefault(_THREAD, me) != me:
                    raise StateError(
                        "one thread at a time may use an EMAModel,"
                        f" got `{name}` while a call of another thread runs"
                    )
                turns.number += 1
                return method(self, *args, **kwargs)
            finally:
                if taken.get(_THREAD) == me:
                    del taken[_THREAD]
        finally:  # once more: Ctrl-C may have come before the lines above
            if taken.get(_THREAD) == me:
                del taken[_THREAD]
            if turns.due:
                turns.catch_up()

    return call
