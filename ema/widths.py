"""Convert between the exponent of a power-function average and the width of its memory.

A power-function average (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models", arXiv:2312.02696, section 3.1) weighs the weights of time ``τ`` in proportion
to ``τ**gamma`` up to now, so its memory is a fixed share of the run. The standard deviation of
that memory, divided by the length of the run, is its relative width. Users find this number easier
to choose than the exponent.
"""

from __future__ import annotations

import math

from ema import validate
from ema.errors import ArgumentError

__all__ = ["LARGEST_STD", "check_std", "gamma_from_std", "std_from_gamma"]

LARGEST_STD = 1.0 / math.sqrt(12.0)
"""Relative width of the flattest profile, ``gamma = 0``: the uniform average."""


def std_from_gamma(gamma: float) -> float:
    """Relative width of a power-function profile: ``sqrt((γ+1) / ((γ+2)² (γ+3)))``.

    Source: arXiv:2312.02696, equation 123.

    >>> round(std_from_gamma(6.94), 4)
    0.1
    """
    gamma = validate.non_negative("gamma", gamma)
    return math.sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


def gamma_from_std(std: float) -> float:
    """The exponent whose profile has relative width ``std``, by bisection.

    Args:
        std: width over the length of the run, in (0, 0.2886…].

    Raises:
        ArgumentError: no power function with a non-negative exponent is that wide.

    >>> round(gamma_from_std(0.1), 2)
    6.94
    """
    std = check_std("std", std)
    low, high = 0.0, 1.0 / std  # std_from_gamma(gamma) < 1 / (gamma + 2), so the root lies below
    while low < (middle := 0.5 * (low + high)) < high:
        if std_from_gamma(middle) > std:
            low = middle
        else:
            high = middle
    return high


def check_std(name: str, std: object) -> float:
    """The width ``std``, given as the argument ``name``, as a float in (0, 0.2886…].

    Raises:
        ArgumentError: no power function with a non-negative exponent is that wide.
        ArgumentTypeError: it is not a number.
    """
    number = validate.positive(name, std)
    if number > LARGEST_STD:
        raise ArgumentError(
            f"`{name}` must not exceed {LARGEST_STD:.4f}, the width of the uniform average,"
            f" got {number}"
        )
    return number
