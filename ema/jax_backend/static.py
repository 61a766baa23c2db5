"""A schedule as a static attribute of an nnx object, whatever class it is of."""

from __future__ import annotations

from typing import Any, final

from ema.schedules import Schedule

__all__ = ["StaticSchedule"]


@final
class StaticSchedule:
    """A holder that nnx can hash and compare, as it does with every static attribute.

    nnx compiles a function anew for an object whose static attributes differ. Fields of a schedule
    of the user's own may have no hash (a list) or no single answer to ``==`` (arrays); then it
    equals only itself.

    Args:
        schedule: any schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StaticSchedule):
            return NotImplemented
        return self.schedule is other.schedule or _are_equal(self.schedule, other.schedule)

    def __hash__(self) -> int:
        return hash(type(self.schedule))

    def __repr__(self) -> str:
        return repr(self.schedule)


def _are_equal(one: Any, other: Any) -> bool:
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # of arrays in a field
        return False
