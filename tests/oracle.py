"""The one oracle: the recursion of an exponential moving average in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["averages"]

Weight = Callable[[int, int], float]
"""``weight(n, t)`` of the update number ``n`` after ``t`` steps."""


def averages(
    start: object,
    history: Iterable[object],
    weight: Weight,
    *,
    update_after_step: int = 0,
    update_every: int = 1,
) -> Iterator[NDArray[np.float64]]:
    """The average after each step: ``average + weight · (params − average)``.

    Args:
        start: the params before the first step.
        history: the params after each step.
        weight: of each update.
        update_after_step: through this step the average equals the params.
        update_every: steps from one update to the next.
    """
    average = np.asarray(start, np.float64)
    for step, params in enumerate(history, start=1):
        live, since = np.asarray(params, np.float64), step - update_after_step
        if since <= 0:
            average = live
        elif since % update_every == 0:
            average = average + weight(since // update_every, since) * (live - average)
        yield average
