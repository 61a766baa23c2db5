"""The meaning of a decay for a run: half-life, window, and the remaining share of initial weights."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import TextIO

import numpy as np

from ema import validate
from ema.decay import compute_optimal_decay, half_life_from_decay
from ema.schedules import ConstantDecay, Schedule, as_schedule
from ema.weights import weight_of, weights_of

__all__ = ["EMADescription", "describe_ema", "print_ema_info"]

_LABEL = 26  # width of the label column
_RULE = 50  # width of the rules
_CHUNK = 1 << 16  # updates whose weights are computed at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class EMADescription:
    """The effect of one schedule in a run of ``total_steps`` steps.

    Half-life and window are in *steps*, whatever ``update_every`` is, and those of the last
    update where the decay changes in the course of the run.
    """

    schedule: Schedule
    total_steps: int
    update_every: int
    decay: float
    """Decay of the last update."""
    half_life_steps: float
    """Steps after which a value counts half."""
    window_steps: float
    """``update_every / (1 − decay)``."""
    updates: int
    """Updates in the run."""
    half_lives: float
    """Half-lives in the run: ``−log2(initial_share)``."""
    initial_share: float
    """Share of the initial weights in the average at the end: the product of all decays."""
    recommended_decay: float
    """The decay per update whose half-life is a tenth of the run."""

    def __str__(self) -> str:
        rule = "=" * _RULE
        rows = [
            ("Decay:", f"{self.decay:.10g}"),
            ("Half-life:", _steps(self.half_life_steps)),
            ("Averaging window:", _steps(self.window_steps)),
            ("Total steps:", f"{self.total_steps}"),
            ("Half-lives in the run:", f"{self.half_lives:.1f}"),
            ("Initial weights left:", _percent(self.initial_share)),
            ("Recommended decay:", f"{self.recommended_decay:.8f}"),
        ]
        if not isinstance(self.schedule, ConstantDecay):
            rows.insert(0, ("Schedule:", f"{self.schedule}"))
            rows[1] = ("Decay at the end:", rows[1][1])
        if self.update_every > 1:
            rows.insert(-4, ("Update every:", f"{self.update_every} steps"))
        table = [f"{label:<{_LABEL}}{value}" for label, value in rows]
        return "\n".join([rule, "EMA CONFIGURATION", rule, *table, rule])


def describe_ema(
    decay: float | Schedule, total_steps: int, *, update_every: int = 1
) -> EMADescription:
    """Describe an average in a run of ``total_steps`` steps.

    Args:
        decay: a decay per update in [0, 1], or a schedule.
        total_steps: steps in the run, at least 1.
        update_every: steps from one update to the next.

    Raises:
        ArgumentError: an argument is out of range, or a schedule of your own gives a weight outside
            [0, 1] or NaN.
        ArgumentTypeError: an argument has the wrong type.

    >>> describe_ema(0.999, 10_000).initial_share < 1e-4
    True
    """
    schedule = as_schedule(decay)
    total_steps = validate.integer("total_steps", total_steps, minimum=1)
    update_every = validate.integer("update_every", update_every, minimum=1)
    updates = total_steps // update_every
    last = weight_of(schedule, max(updates, 1), update_every)
    log_share = _log_initial_share(schedule, updates, update_every)
    return EMADescription(
        schedule=schedule,
        total_steps=total_steps,
        update_every=update_every,
        decay=schedule.decay if isinstance(schedule, ConstantDecay) else 1.0 - last,
        half_life_steps=update_every * _half_life_from_weight(last),
        window_steps=update_every / last if last else math.inf,
        updates=updates,
        half_lives=abs(log_share) / math.log(2.0),  # abs: no −0.0
        initial_share=math.exp(log_share),
        recommended_decay=compute_optimal_decay(total_steps / update_every),
    )


def print_ema_info(
    decay: float | Schedule,
    total_steps: int,
    *,
    update_every: int = 1,
    file: TextIO | None = None,
) -> None:
    """Print :func:`describe_ema` as a table.

    >>> print_ema_info(0.999, 10_000)
    ==================================================
    EMA CONFIGURATION
    ==================================================
    Decay:                    0.999
    Half-life:                693 steps
    Averaging window:         1000 steps
    Total steps:              10000
    Half-lives in the run:    14.4
    Initial weights left:     0.0045 %
    Recommended decay:        0.99930709
    ==================================================
    """
    print(describe_ema(decay, total_steps, update_every=update_every), file=file or sys.stdout)


def _half_life_from_weight(weight: float) -> float:
    """``-ln 2 / ln(1 − weight)`` without forming ``1 − weight``."""
    if weight in (0.0, 1.0):
        return half_life_from_decay(1.0 - weight)
    return -math.log(2.0) / math.log1p(-weight)


def _log_initial_share(schedule: Schedule, updates: int, span: int) -> float:
    """``Σ ln(1 − w_n)`` over the updates of a run."""
    total = 0.0
    for start in range(1, updates + 1, _CHUNK):
        counts = np.arange(start, min(start + _CHUNK, updates + 1), dtype=np.float64)
        weights = weights_of(schedule, counts, span)
        with np.errstate(divide="ignore"):  # a weight of 1 forgets all: ln 0 = −∞
            logs = np.log1p(-weights)
        if logs.ndim == 0:  # the same weight at every count
            return updates * float(logs)
        total += float(logs.sum())
        if math.isinf(total):
            break
    return total


def _steps(steps: float) -> str:
    if math.isinf(steps):
        return "infinite: the average does not move"
    return f"{steps:.0f} steps" if steps >= 10 else f"{steps:.3g} steps"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.4g} %"
