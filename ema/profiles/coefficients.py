"""Coefficients of power-function snapshots for a power-function average of another width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from ema import validate
from ema.errors import ArgumentError, ArgumentTypeError, shown
from ema.profiles.closed import PowerProfile
from ema.profiles.combination import combine
from ema.profiles.profile import Floats
from ema.widths import check_std

__all__ = ["Metric", "posthoc_coefficients"]

Metric = Literal["tails", "response"]


def posthoc_coefficients(
    steps: Sequence[float],
    stds: Sequence[float],
    target_step: float,
    target_std: float,
    metric: Metric = "tails",
) -> Floats:
    """Coefficients that make a power-function average of width ``target_std`` out of snapshots.

    Profiles are continuous: only ratios of steps matter. Use :func:`ema.profiles.combine` with
    :class:`ema.profiles.Run` for averages of any schedule in a run of so many steps.

    Args:
        steps: step of each snapshot, above 0, in any order.
        stds: relative width of each snapshot's average, in (0, 0.2886…], as many as ``steps``.
        target_step: step of the average that is wanted, at most the last of ``steps``.
        target_std: relative width of the average that is wanted, in (0, 0.2886…].
        metric: ``"tails"`` compares how much of each step's movement two averages contain, with
            coefficients that sum to 1. ``"response"`` is the algorithm of Karras et al. 2024
            (arXiv:2312.02696, section 3.2 and appendix C): it compares the shares of each step's
            params, and the coefficients are then divided by their sum.

    Returns:
        Float64, one coefficient for each (step, std) pair, in the order given; 0 for steps past
        ``target_step``. A snapshot that is the target has coefficient 1.

    Raises:
        ArgumentError: a value is out of range, the lengths differ, two pairs are equal,
            ``target_step`` lies past the last snapshot, or fewer than two snapshots lie up to it.
        ArgumentTypeError: an argument has the wrong type.

    >>> steps, stds = [1000, 1000, 2000, 2000], [0.05, 0.10, 0.05, 0.10]
    >>> posthoc_coefficients(steps, stds, 2000, 0.10)
    array([0., 0., 0., 1.])
    >>> float(posthoc_coefficients(steps, stds, 2000, 0.15).sum().round(12))
    1.0
    """
    pairs = _pairs(steps, stds)
    target = (validate.positive("target_step", target_step), check_std("target_std", target_std))
    if metric not in get_args(Metric):
        raise ArgumentError(f"`metric` must be 'tails' or 'response', got {shown(metric)}")
    last = max(step for step, _ in pairs)
    if target[0] > last:
        raise ArgumentError(
            f"`target_step` must not exceed the last of `steps` ({last:g}), got {target[0]:g}"
        )
    used = [index for index, (step, _) in enumerate(pairs) if step <= target[0]]
    coefficients = np.zeros(len(pairs))
    if target in pairs:
        coefficients[pairs.index(target)] = 1.0
        return coefficients
    if len(used) < 2:
        raise ArgumentError(
            f"`steps` must hold at least two snapshots up to `target_step` ({target[0]:g}),"
            f" got {len(used)}"
        )
    sources = [_profile(pair) for pair in pairs]
    if metric == "tails":
        return combine(sources, _profile(target), continuous=True).coefficients
    coefficients[used] = _closest_responses([sources[index] for index in used], _profile(target))
    return coefficients


def _pairs(steps: Sequence[float], stds: Sequence[float]) -> list[tuple[float, float]]:
    for name, values in (("steps", steps), ("stds", stds)):
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise ArgumentTypeError(
                f"`{name}` must be a sequence of numbers, got {shown(values)}"
                f" ({type(values).__name__})"
            )
    if len(stds) != len(steps):
        raise ArgumentError(
            f"`stds` must have one entry for each of `steps` ({len(steps)}), got {len(stds)}"
        )
    if not len(steps):
        raise ArgumentError("`steps` must hold at least two snapshots, got 0")
    pairs = [
        (validate.positive(f"steps[{index}]", step), check_std(f"stds[{index}]", std))
        for index, (step, std) in enumerate(zip(steps, stds, strict=True))
    ]
    for index, pair in enumerate(pairs):
        if pair in pairs[:index]:
            raise ArgumentError(
                "each pair of `steps` and `stds` must be there once, got"
                f" step {pair[0]:g} with std {pair[1]:g} twice"
            )
    return pairs


def _profile(pair: tuple[float, float]) -> PowerProfile:
    step, std = pair
    return PowerProfile.from_std(std, step)


def _closest_responses(sources: Sequence[PowerProfile], target: PowerProfile) -> Floats:
    """The least-squares fit of responses, divided by its sum."""
    steps = np.array([source.step for source in sources])
    gammas = np.array([source.gamma for source in sources])
    gram = _inner_product(steps[:, None], gammas[:, None], steps, gammas)
    try:
        found = np.linalg.solve(gram, _inner_product(steps, gammas, target.step, target.gamma))
    except np.linalg.LinAlgError:
        raise ArgumentError(
            "`steps` and `stds` must be distinct enough to tell the snapshots apart, got two alike"
        ) from None
    return np.asarray(found / found.sum())


def _inner_product(
    steps_a: Floats, gammas_a: Floats, steps_b: Floats | float, gammas_b: Floats | float
) -> Floats:
    """``∫ response_a · response_b dτ`` of power functions, elementwise (appendix C)."""
    ratios = steps_a / steps_b
    exponents = np.where(steps_a < steps_b, gammas_b, -gammas_a)
    product = (gammas_a + 1.0) * (gammas_b + 1.0) * ratios**exponents
    return np.asarray(product / ((gammas_a + gammas_b + 1.0) * np.maximum(steps_a, steps_b)))
