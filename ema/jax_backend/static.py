"""Validated options as a static attribute of an nnx object, with any schedule."""

from __future__ import annotations

import dataclasses
from typing import Any, final

from ema.jax_backend.settings import Settings

__all__ = ["StaticSettings"]


@final
class StaticSettings:
    """A holder that nnx can hash and compare, as it does with every static attribute.

    nnx compiles a function again for an object whose static attributes differ. A field of a
    user's schedule may have no hash (a list), or ``==`` may not give one bool (arrays); then the
    schedule equals only itself.

    Args:
        settings: any options.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StaticSettings):
            return NotImplemented
        ours, theirs = _fields(self.settings), _fields(other.settings)
        return all(map(_are_equal, ours, theirs))

    def __hash__(self) -> int:
        return hash(tuple(map(type, self.settings.schedules.values())))

    def __repr__(self) -> str:
        return repr(self.settings)


def _fields(settings: Settings) -> list[Any]:
    """The options, in the order of the fields; there is one schedule."""
    fields = [getattr(settings, each.name) for each in dataclasses.fields(settings)]
    (schedule,) = settings.schedules.values()
    return [schedule if field is settings.schedules else field for field in fields]


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except Exception:  # arrays in a field raise
        return False
