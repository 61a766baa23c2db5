"""The one timing loop: several contenders, measured in turn.

Other processes, clock rates and memory pages change from second to second, so two figures from
different minutes say little. Here each round gives each contender one sample, in a random order.
Ratios and differences are taken within a round, and their medians are reported.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from collections.abc import Callable, Sequence

__all__ = ["Case", "Contender", "Effort", "measure"]

FEWEST_ROUNDS = 7
LONG = 0.02
"""Seconds in which a call goes through more memory than any cache holds."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: unique in its case.
        call: the work that is timed.
        kind: ``"ours"``, ``"peer"`` or ``"limit"``.
        finish: waits for what ``call`` has left running (asynchronous dispatch); timed once a
            sample. None: wait for the device of the setting.
        traffic: bytes that one call has to move through memory. None: those of the case.
    """

    name: str
    call: Callable[[], object]
    _: dataclasses.KW_ONLY
    kind: str = "peer"
    finish: Callable[[], object] | None = None
    traffic: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Contenders that do the same work.

    Attributes:
        title: what is done, on what.
        contenders: who does it.
        references: names of contenders; each gets a column of ratios, the first is the limit.
        added: also show the time that each contender adds to the limit, and its ratio to the time
            that the first contender adds.
        traffic: of the contenders that have none; None shows no bandwidths.
        note: what the table should show.
    """

    title: str
    contenders: Sequence[Contender]
    references: Sequence[str]
    added: bool = False
    traffic: int | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: samples of each contender, at most.
        seconds: for all rounds of a case; fewer rounds where they take longer, but seven.
        sample: seconds that a sample lasts at least; short calls are repeated. 0: each sample is
            one call, and no call is made before the first sample.
    """

    rounds: int
    seconds: float = 0
    sample: float = 0


def measure(
    contenders: Sequence[Contender],
    effort: Effort,
    finish: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one call of each contender, one figure for each round.

    Args:
        contenders: who is timed.
        effort: how long to measure.
        finish: of the contenders that have none.
    """
    order = [dataclasses.replace(c, finish=c.finish or finish) for c in contenders]
    once = {c.name: _once(c, effort.sample) if effort.sample else LONG for c in order}
    calls = {name: max(1, round(effort.sample / call)) for name, call in once.items()}
    a_round = sum(calls[name] * call + (call < LONG) * call for name, call in once.items())
    rounds = min(effort.rounds, max(FEWEST_ROUNDS, int(effort.seconds / a_round)))
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    shuffle = random.Random(0).shuffle  # noqa: S311 — an order, not a secret
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for contender in order:
                if once[contender.name] < LONG:
                    _time(contender, 1)  # what the caches hold must not depend on the order
                seconds[contender.name].append(_time(contender, calls[contender.name]))
    finally:
        gc.enable()
    return seconds


def _once(contender: Contender, sample: float) -> float:
    """Warm up, and seconds of a call."""
    _time(contender, 1)
    once = _time(contender, 1)
    return once if once > sample else min(_time(contender, 1) for _ in range(3))


def _time(contender: Contender, calls: int) -> float:
    """Seconds of one call, the mean of several."""
    call = contender.call
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if contender.finish is not None:
        contender.finish()
    return (time.perf_counter() - start) / calls
