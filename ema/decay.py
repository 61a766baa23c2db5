"""Decay, half-life, window and weight of an exponential moving average, in float64.

An average with decay ``β`` follows ``average = β · average + (1 − β) · params``. After ``h``
updates a value counts half where ``β**h = 1/2``: ``h`` is the half-life. ``1/(1−β)`` is the
window, the mean age of what the average remembers, and ``1 − β`` the weight of the newest value.
"""

from __future__ import annotations

import math

from ema import validate

__all__ = [
    "compute_optimal_decay",
    "decay_from_half_life",
    "half_life_from_decay",
    "scale_decay",
    "window_from_decay",
]


def decay_from_half_life(half_life: float) -> float:
    """The decay ``2**(-1/half_life)`` for which a value counts half after ``half_life`` updates.

    Args:
        half_life: updates, above 0.

    Raises:
        ArgumentError: ``half_life`` is not positive and finite.

    >>> decay_from_half_life(1000)
    0.9993070929904525
    """
    return math.pow(0.5, 1.0 / validate.positive("half_life", half_life))


def half_life_from_decay(decay: float) -> float:
    """Updates after which a value counts half: ``-ln 2 / ln decay`` (0 at decay 0, ∞ at 1).

    >>> round(half_life_from_decay(0.999), 2)
    692.8
    """
    decay = validate.fraction("decay", decay)
    if decay == 0.0:
        return 0.0
    return math.inf if decay == 1.0 else -math.log(2.0) / math.log(decay)


def window_from_decay(decay: float) -> float:
    """Updates that the average looks back on: ``1 / (1 − decay)`` (∞ at decay 1).

    >>> round(window_from_decay(0.999))
    1000
    """
    weight = 1.0 - validate.fraction("decay", decay)
    return math.inf if weight == 0.0 else 1.0 / weight


def scale_decay(decay: float, ratio: float) -> float:
    """The decay that keeps the average's memory when the batch grows by ``ratio``: ``decay**ratio``.

    Source: Busbridge et al. 2023, "How to Scale Your EMA", arXiv:2307.13813, section 2.

    Args:
        decay: the decay that was right, in [0, 1].
        ratio: new batch size over old, above 0.

    Raises:
        ArgumentError: one of them is out of range.

    >>> scale_decay(0.9999, 8)
    0.9992002799440071
    """
    return math.pow(validate.fraction("decay", decay), validate.positive("ratio", ratio))


def compute_optimal_decay(total_steps: float, target_half_life_steps: float | None = None) -> float:
    """The decay for a run of ``total_steps`` updates: half-life a tenth of the run.

    Args:
        total_steps: updates in the whole run, above 0.
        target_half_life_steps: another half-life, in updates.

    Returns:
        ``2**(-1/half_life)``.

    Raises:
        ArgumentError: one of them is not positive and finite.

    >>> compute_optimal_decay(10_000)
    0.9993070929904525
    """
    total_steps = validate.positive("total_steps", total_steps)
    if target_half_life_steps is None:
        return decay_from_half_life(total_steps / 10)
    return decay_from_half_life(validate.positive("target_half_life_steps", target_half_life_steps))
