"""Fields of an object as plain values: numbers, strings, lists and dicts that JSON gives back equal.

JSON has no infinities and no NaN, so these become the strings ``"inf"``, ``"-inf"`` and ``"nan"``.
Tuples become lists, NumPy scalars Python numbers, and nested dataclasses dicts of their fields.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ema.errors import ArgumentTypeError

__all__ = ["number_from_plain", "plain", "plain_fields"]

_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

_DEEPEST = 32
"""Levels of lists and dicts in one another; a list that contains itself has no end."""


def plain(value: Any, levels: int = _DEEPEST) -> Any:
    """``value`` as numbers, strings, None, lists and dicts with strings as keys.

    Args:
        value: any object.
        levels: lists and dicts that may still be inside one another.

    Raises:
        ArgumentTypeError: it is, or contains, something else, such as an array or a function.

    >>> plain((1, np.float32(0.5), math.inf))
    [1, 0.5, 'inf']
    """
    if value is None:
        return None
    for kind, convert in _LEAVES:
        if isinstance(value, kind):
            return convert(value)
    if levels == 0:
        raise ArgumentTypeError(f"plain values must be nested at most {_DEEPEST} levels deep")
    if isinstance(value, list | tuple):
        return [plain(entry, levels - 1) for entry in value]
    if isinstance(value, Mapping):
        return _plain_mapping(value, levels - 1)
    if callable(getattr(value, "to_dict", None)) and not isinstance(value, type):
        return plain(value.to_dict(), levels - 1)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain_fields(value, levels - 1)
    raise ArgumentTypeError(
        f"plain values must be numbers, strings, lists or dicts, got {type(value).__name__}"
    )


def plain_fields(instance: Any, levels: int = _DEEPEST) -> dict[str, Any]:
    """The fields of a dataclass, or the public attributes of another object, as plain values.

    Fields that a dataclass does not compare by, and cached properties, are left out: they say
    nothing about which object it is.

    Args:
        instance: the object.
        levels: see :func:`plain`.

    Raises:
        ArgumentTypeError: the value of one of them is not plain.
    """
    return {name: plain(getattr(instance, name), levels) for name in _field_names(instance)}


def number_from_plain(value: Any) -> Any:
    """The infinity or NaN that a string of :func:`plain` means; any other value as it is."""
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _number(value: Any) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


_LEAVES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (bool, bool),
    (np.bool_, bool),
    (str, str.__str__),
    (numbers.Integral, int),
    (numbers.Real, _number),
)


def _plain_mapping(values: Mapping[Any, Any], levels: int) -> dict[str, Any]:
    for key in values:
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise ArgumentTypeError(f"keys of plain values must be strings, got {key!r:.80}")
    entries = {str(key): plain(value, levels) for key, value in values.items()}
    if len(entries) != len(values):
        raise ArgumentTypeError("keys of plain values must differ as strings, such as 1 and '1'")
    return entries


def _field_names(instance: Any) -> list[str]:
    cls = type(instance)
    declared = dataclasses.fields(instance) if dataclasses.is_dataclass(instance) else ()
    names = [field.name for field in declared if field.compare]
    if "__dataclass_fields__" in vars(cls):
        return names
    known = {field.name for field in declared}
    return names + [
        name
        for name in _attributes(instance)
        if name not in known and not name.startswith("_") and not _is_cached(cls, name)
    ]


def _attributes(instance: Any) -> dict[str, None]:
    """Names in the object's dict and in the ``__slots__`` of its classes, each once."""
    names: dict[str, None] = {}
    for cls in reversed(type(instance).__mro__):
        slots = vars(cls).get("__slots__", ())
        names |= dict.fromkeys((slots,) if isinstance(slots, str) else slots)
    return names | dict.fromkeys(getattr(instance, "__dict__", ()))


def _is_cached(cls: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(cls, name, None), functools.cached_property)
