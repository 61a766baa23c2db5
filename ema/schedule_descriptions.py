"""The description of a schedule in a saved state: its class and fields, as plain values.

A description is for people, and for the warning that a run goes on with another schedule. The
schedule itself is always that of the constructor, so loading needs neither description nor class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ema.errors import ArgumentError, EMAError
from ema.plain_values import plain
from ema.schedules import Schedule, schedule_from_dict

__all__ = ["describe_schedule", "describe_schedules", "known_schedule", "same_description"]

_LONGEST = 1 << 16
"""Characters of a description: a table of a million decays does not belong in every header."""


def describe_schedule(schedule: object) -> dict[str, Any] | None:
    """The class and the fields of a schedule, or None where it cannot be described.

    It never raises, since no save may fail because of a schedule.

    Args:
        schedule: a schedule of any class, or a description of one.

    Returns:
        The result of :meth:`ema.Schedule.to_dict`. None where that raises, holds values that are not
        plain, or takes more than 65,536 characters of JSON.
    """
    try:
        fields = plain(schedule.to_dict() if isinstance(schedule, Schedule) else schedule)
        if isinstance(schedule, Schedule) and not isinstance(fields.get("schedule"), str):
            fields["schedule"] = type(schedule).__name__  # a to_dict of the user's own
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
        text.encode()  # a file holds Unicode
    except Exception:  # a field of the user's own may be of any class
        return None
    if not _is_description(fields) or len(text) > _LONGEST:
        return None
    description: dict[str, Any] = fields
    return description


def describe_schedules(schedules: Any, *, several: bool) -> dict[str, Any] | None:
    """:func:`describe_schedule`, or a mapping of these from the names of several averages."""
    if several and isinstance(schedules, Mapping):
        return {name: describe_schedule(schedule) for name, schedule in schedules.items()}
    return describe_schedule(schedules)


def same_description(one: object, other: object) -> bool:
    """Whether two schedules or descriptions agree; one that cannot be described always does."""
    first, second = describe_schedule(one), describe_schedule(other)
    return first is None or second is None or first == second


def known_schedule(description: object) -> Schedule | dict[str, Any]:
    """The schedule of this library that was described; a description of any other as it is.

    Raises:
        ArgumentError: it does not name a class.
    """
    if not isinstance(description, Mapping) or not _is_description(description):
        raise ArgumentError(
            f"a schedule needs its class under the key 'schedule', got {description!r:.80}"
        )
    try:
        schedule = schedule_from_dict(description)
    except EMAError:
        return dict(description)
    # a class of the user's own may have the name of one of ours, and fewer fields
    return schedule if schedule.to_dict() == description else dict(description)


def _is_description(fields: object) -> bool:
    return isinstance(fields, Mapping) and isinstance(fields.get("schedule"), str)
