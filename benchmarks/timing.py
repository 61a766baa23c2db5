"""The one timing loop: several contenders, measured in turn.

Other processes, clock rates and memory pages change from second to second, so two figures from
different minutes say little. Here each round gives each contender one sample, in a random order.
Ratios and differences are taken within a round, and their medians are reported.
"""

from __future__ import annotations

import dataclasses
import gc
import operator
import random
import statistics
import time
from collections.abc import Callable, Sequence

__all__ = ["Case", "Contender", "Effort", "Measurement", "measure"]

FEWEST_ROUNDS = 7
LONG = 0.02
"""Seconds in which a call goes through more memory than any cache holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to time.

    Attributes:
        name: unique in its case.
        call: the work.
        kind: ``"ours"``, ``"peer"`` or ``"limit"``.
        finish: waits for what ``call`` has left running (asynchronous dispatch); timed once a
            sample. None: that of the case.
        traffic: bytes that one call has to move through memory. None: those of the case.
    """

    name: str
    call: Callable[[], object]
    kind: str = "peer"
    finish: Callable[[], object] | None = None
    traffic: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Contenders that do the same work, and which of them the others are measured by.

    Attributes:
        title: what is done, on what.
        contenders: who does it.
        references: names of contenders; each gets a column of ratios, the first is the limit.
        baseline: the contender that leaves the work out; the others get the time they add to it.
        unit: the contender whose added time the other added times are divided by.
        finish: of the contenders that have none.
        traffic: of the contenders that have none.
        note: what the table should show.
    """

    title: str
    contenders: Sequence[Contender]
    references: Sequence[str]
    baseline: str | None = None
    unit: str | None = None
    finish: Callable[[], object] | None = None
    traffic: int | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: samples of each contender, at most.
        seconds: for all rounds of a case; fewer rounds where they take longer, but seven.
        sample: seconds that a sample lasts at least; short calls are repeated.
    """

    rounds: int
    seconds: float
    sample: float = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of one contender.

    Attributes:
        name: of the contender.
        kind: likewise.
        seconds: one call, for each round.
        ratios: reference to the median over the rounds of the ratio to it.
        added: median over the rounds of the seconds beyond those of the baseline.
        traffic: bytes a call.
    """

    name: str
    kind: str
    seconds: list[float]
    ratios: dict[str, float]
    added: float | None
    traffic: int | None

    @property
    def median(self) -> float:
        """Seconds of one call."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds of one call, which a quarter of the rounds stayed below and above."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high


def measure(case: Case, effort: Effort, *, warm: bool = True) -> list[Measurement]:
    """Time all contenders of a case, which are reported in the order given.

    Args:
        case: the contenders.
        effort: how long to measure; without ``warm`` its rounds count alone.
        warm: call each contender before; else each round is one call.
    """
    contenders = [dataclasses.replace(c, finish=c.finish or case.finish) for c in case.contenders]
    single = {c.name: _single(c, effort) if warm else LONG for c in contenders}
    calls = {name: max(1, round(effort.sample / call)) for name, call in single.items()}
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle  # noqa: S311 — an order, not a secret
    gc.collect()
    gc.disable()
    try:
        for _ in range(_rounds(single, calls, effort) if warm else effort.rounds):
            shuffle(order)
            for contender in order:
                if single[contender.name] < LONG:
                    _time(contender, 1)  # what the caches hold must not depend on the order
                seconds[contender.name].append(_time(contender, calls[contender.name]))
    finally:
        gc.enable()

    def over(combine: Callable[[float, float], float], name: str, other: str) -> float:
        """The median over the rounds of a ratio or a difference."""
        return statistics.median(
            combine(one, two) for one, two in zip(seconds[name], seconds[other], strict=True)
        )

    return [
        Measurement(
            name=c.name,
            kind=c.kind,
            seconds=seconds[c.name],
            ratios={r: over(operator.truediv, c.name, r) for r in case.references},
            added=None if case.baseline is None else over(operator.sub, c.name, case.baseline),
            traffic=case.traffic if c.traffic is None else c.traffic,
        )
        for c in contenders
    ]


def _single(contender: Contender, effort: Effort) -> float:
    """Warm up, and seconds of a call."""
    _time(contender, 1)
    once = _time(contender, 1)
    return once if once > effort.sample else min(_time(contender, 1) for _ in range(3))


def _rounds(single: dict[str, float], calls: dict[str, int], effort: Effort) -> int:
    """As many as the time allows."""
    a_round = sum(calls[name] * call + (call < LONG) * call for name, call in single.items())
    affordable = max(FEWEST_ROUNDS, int(effort.seconds / a_round))
    return min(effort.rounds, affordable)


def _time(contender: Contender, calls: int) -> float:
    """Seconds of one call, the mean of several."""
    call = contender.call
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if contender.finish is not None:
        contender.finish()
    return (time.perf_counter() - start) / calls
