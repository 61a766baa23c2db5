"""Numbers with their units, read from what people type and shown in three digits.

Prefixes are decimal: 1 GB is 10⁹ bytes.
"""

from __future__ import annotations

import math
import re

from ema import validate
from ema.errors import ArgumentError

__all__ = ["parse_quantity", "show_bytes", "show_count", "show_seconds"]

_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "p": 1e15}
_QUANTITY = re.compile(
    r"([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?) ?([kmgbtp]?)(?:b(?:/s)?)?",
    re.ASCII | re.I,
)


def parse_quantity(name: str, text: str) -> float:
    """The number that ``text`` writes: ``70e9``, ``70B``, ``124M``, ``3.35T``, ``64GB/s``.

    Args:
        name: of the argument, for the error.
        text: digits, perhaps with an exponent; perhaps one of k, M, G or B (both 10⁹), T, P;
            perhaps ``B`` or ``B/s``. Upper and lower case are alike.

    Raises:
        ArgumentError: the text is not such a number, or the number is not finite.

    >>> parse_quantity("params", "70B")
    70000000000.0
    >>> parse_quantity("memory_bandwidth", "3.35 TB/s")
    3350000000000.0
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise ArgumentError(
            f"`{name}` must be a number such as 70e9, 70B, 124M or 3.35T, got {text!r}"
        )
    return validate.real(name, float(match[1]) * _FACTORS[match[2].lower()])


def show_bytes(count: float) -> str:
    """Bytes with a decimal prefix.

    >>> show_bytes(546_875_000)
    '547 MB'
    """
    return _show(count, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))


def show_count(count: float) -> str:
    """A number of things in words.

    >>> show_count(70_000_000_000)
    '70 billion'
    """
    return _show(count, ("", "thousand", "million", "billion", "trillion"))


def show_seconds(seconds: float) -> str:
    """Seconds, or a small part of one.

    >>> show_seconds(4.08e-4)
    '0.408 ms'
    """
    if 0.0 < seconds < 1e-4:
        return f"{_digits(seconds * 1e6)} µs"
    return f"{_digits(seconds * 1e3)} ms" if 0.0 < seconds < 1.0 else f"{_digits(seconds)} s"


def _show(number: float, units: tuple[str, ...]) -> str:
    power = 0
    # what would be shown as 1000 of a unit is 1 of the next
    while float(f"{number:.3g}") >= 1000.0 and power < len(units) - 1:
        number /= 1000.0
        power += 1
    return f"{_digits(number)} {units[power]}".rstrip()


def _digits(number: float) -> str:
    """Three digits; all of those before the decimal point."""
    if number == 0.0 or not math.isfinite(number):
        return f"{number:g}"
    return f"{number:.0f}" if abs(number) >= 999.5 else f"{number:.3g}"
