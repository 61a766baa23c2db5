"""Time several contenders in turn.

Other processes, clock rates and memory pages change from second to second, so that two figures
from different minutes say little. Here every round gives each contender one sample, in an order
drawn anew, and what is compared are the ratios within a round; of those, and of the times, the
median counts.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Case", "Contender", "Effort", "Measurement", "measure"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to time.

    Attributes:
        name: unique in its case.
        call: the work.
        finish: waits for what ``call`` has left running (asynchronous dispatch); timed once a
            sample.
        kind: ``"ours"``, ``"peer"`` or ``"limit"``.
    """

    name: str
    call: Callable[[], object]
    finish: Callable[[], object] | None = None
    kind: str = "peer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Contenders that do the same work, and which of them the others are measured by.

    Attributes:
        title: what is done, on what.
        contenders: who does it.
        references: names of contenders; each gets a column of ratios.
    """

    title: str
    contenders: Sequence[Contender]
    references: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: samples of each contender.
        sample: seconds that a sample lasts at least; short calls are repeated.
    """

    rounds: int
    sample: float = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of one contender.

    Attributes:
        seconds: one call, for each round.
        ratios: reference to the median over the rounds of the ratio to it.
    """

    name: str
    kind: str
    seconds: list[float]
    ratios: dict[str, float]

    @property
    def median(self) -> float:
        """Seconds of one call."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds of one call, which a quarter of the rounds stayed below and above."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {**dataclasses.asdict(self), "median": self.median}


def measure(case: Case, effort: Effort) -> list[Measurement]:
    """Time all contenders of a case, in the order given."""
    calls = {contender.name: _calls(contender, effort) for contender in case.contenders}
    seconds: dict[str, list[float]] = {contender.name: [] for contender in case.contenders}
    order = list(case.contenders)
    shuffle = random.Random(0).shuffle  # noqa: S311 — an order, not a secret
    gc.collect()
    gc.disable()
    try:
        for _ in range(effort.rounds):
            shuffle(order)
            for contender in order:
                _time(contender, 1)  # whose data the caches hold must not depend on the order
                seconds[contender.name].append(_time(contender, calls[contender.name]))
    finally:
        gc.enable()
    return [
        Measurement(
            name=contender.name,
            kind=contender.kind,
            seconds=seconds[contender.name],
            ratios={
                reference: statistics.median(
                    ours / theirs
                    for ours, theirs in zip(
                        seconds[contender.name], seconds[reference], strict=True
                    )
                )
                for reference in case.references
            },
        )
        for contender in case.contenders
    ]


def _calls(contender: Contender, effort: Effort) -> int:
    """Warm up, and find how many calls make a sample."""
    _time(contender, 2)
    return max(1, round(effort.sample / min(_time(contender, 1) for _ in range(3))))


def _time(contender: Contender, calls: int) -> float:
    """Seconds of one call, the mean of several."""
    call = contender.call
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if contender.finish is not None:
        contender.finish()
    return (time.perf_counter() - start) / calls
