"""Checks of arguments: each returns the value as a plain Python number or raises.

Messages have the form *name, rule, value*. Conditions are written so that NaN fails them.
"""

from __future__ import annotations

import math
import numbers

from ema.errors import ArgumentError, ArgumentTypeError, shown

__all__ = [
    "boolean",
    "fraction",
    "integer",
    "non_negative",
    "positive",
    "positive_or_infinite",
    "real",
]


def boolean(name: str, value: object) -> bool:
    """True or False; a number is neither."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"`{name}` must be True or False, got {shown(value)}")
    return value


def real(name: str, value: object) -> float:
    """A finite real number; a bool is not one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(
            f"`{name}` must be a real number, got {shown(value)} ({type(value).__name__})"
        )
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction beyond float64
        number = -math.inf if value < 0 else math.inf
    if not math.isfinite(number):
        raise ArgumentError(f"`{name}` must be finite, got {number}")
    return number


def fraction(name: str, value: object) -> float:
    """A number in [0, 1]."""
    number = real(name, value)
    if not 0.0 <= number <= 1.0:
        raise ArgumentError(f"`{name}` must lie in [0, 1], got {number}")
    return number


def positive(name: str, value: object) -> float:
    """A number above 0."""
    number = real(name, value)
    if not number > 0.0:
        raise ArgumentError(f"`{name}` must be positive, got {number}")
    return number


def positive_or_infinite(name: str, value: object) -> float:
    """A number above 0, or +∞."""
    infinite = isinstance(value, numbers.Real) and value == math.inf
    return math.inf if infinite else positive(name, value)


def non_negative(name: str, value: object) -> float:
    """A number of at least 0."""
    number = real(name, value)
    if not number >= 0.0:
        raise ArgumentError(f"`{name}` must not be negative, got {number}")
    return number


def integer(name: str, value: object, minimum: int, bits: int | None = None) -> int:
    """An integer of at least ``minimum``, and below ``2**bits``; a bool or a float is not one."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentTypeError(
            f"`{name}` must be an integer, got {shown(value)} ({type(value).__name__})"
        )
    number = int(value)
    if number < minimum:
        raise ArgumentError(f"`{name}` must be at least {minimum}, got {shown(number)}")
    if bits is not None and number >= 1 << bits:
        raise ArgumentError(f"`{name}` must be below 2**{bits}, got {shown(number)}")
    return number
