"""Replace methods of one object for a while; copies and pickles keep the original methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["overridden"]

_NOTHING = object()

Around = Callable[..., Any]
"""``around(original, *args, **kwargs)`` is called in place of ``original(*args, **kwargs)``."""


class _Override:
    """An attribute of one object that covers a method until it is undone."""

    def __init__(self, owner: object, name: str, around: Around) -> None:
        self._owner = owner
        self._name = name
        self.around: Around | None = around
        self._original = self.__wrapped__ = getattr(owner, name)
        self.__func__ = getattr(self._original, "__func__", None)  # torch.compile looks at it
        self.before = vars(owner).get(name, _NOTHING)
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.around is None or torch.compiler.is_dynamo_compiling():
            return self._original(*args, **kwargs)
        return self.around(self._original, *args, **kwargs)

    def undo(self) -> None:
        """Restore the previous attribute; if a later one covers this one, only pass calls on."""
        self.around = None
        own = vars(self._owner)
        if own.get(self._name) is not self:
            return
        before = self.before
        while isinstance(before, _Override) and before.around is None:
            before = before.before
        if before is _NOTHING:
            del own[self._name]
        else:
            own[self._name] = before

    def uncovered(self) -> Any:
        """The attribute from before every override, or ``_NOTHING``."""
        before = self.before
        return before.uncovered() if isinstance(before, _Override) else before


@contextmanager
def overridden(owner: object, **methods: Around) -> Iterator[None]:
    """Replace methods of ``owner`` inside the block.

    The replacements are attributes of the instance, so neither its class nor another instance
    changes. Copies (``copy.copy``, ``copy.deepcopy``) and pickles that are made inside the block
    do not contain the replacements.

    Args:
        owner: an object with a ``__dict__``.
        **methods: for each method name, the function to call in place of the method.
    """
    arounds = {"__getstate__": _state_without_overrides, **methods}
    placed: list[_Override] = []
    try:
        placed.extend(_Override(owner, name, around) for name, around in arounds.items())
        yield
    finally:
        for override in reversed(placed):
            override.undo()


def _state_without_overrides(original: Callable[[], Any]) -> Any:
    state = original()
    if not isinstance(state, dict):
        return state
    plain = {
        name: value.uncovered() if isinstance(value, _Override) else value
        for name, value in state.items()
    }
    return {name: value for name, value in plain.items() if value is not _NOTHING}
