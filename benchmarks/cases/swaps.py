"""The average into the model and the live weights back, as around every evaluation."""

from __future__ import annotations

import statistics

from benchmarks.models import Buffers, count, gpt2, size
from benchmarks.peers import SWAPS, kind, swap_of, swaps
from benchmarks.report import Report, Row, short
from benchmarks.setting import Setting, in_fresh_process
from benchmarks.timing import Case, Contender, Effort, measure


def repeated(setting: Setting) -> Case:
    """A swap that is repeated.

    Without ``assign`` parameters keep their memory. An exchange of two tensors reads and writes both,
    16 bytes for each element, and there are two exchanges. A flat copy moves 8 bytes for each element,
    so four of them are the limit.
    """
    model = gpt2(setting)
    copy = Buffers(model, setting).copy().call

    def copies() -> None:
        for _ in range(4):
            copy()

    return Case(
        title=f"swap in and out: GPT-2, {size(model)}",
        contenders=[*swaps(model), Contender("4 flat copies", copies, kind="limit")],
        references=["4 flat copies", "ema"],
        traffic=32 * count(model),
        note="Bar: diffusers at 2 times ema. Assigned, parameters refer to the averages and nothing is"
        " moved.",
    )


def first(setting: Setting) -> Report:
    """The first two swaps of a process, each contender in processes of its own, in turn.

    A repeated swap of a peer finds the memory that its last one has given back. In training other code
    takes that memory, so a first swap asks the system for the memory of every copy.
    """
    rounds = 1 if setting.size == "tiny" else 7
    found: dict[str, list[list[float]]] = {name: [] for name in SWAPS}
    for _ in range(rounds):
        for name, samples in found.items():
            samples.append(in_fresh_process(first_swaps, name, setting))
    rows = []
    for name, samples in found.items():
        cells = []
        for swap in range(2):
            seconds, ours = ([each[swap] for each in of] for of in (samples, found["ema"]))
            ratios = [one / two for one, two in zip(seconds, ours, strict=True)]
            cells += [short(statistics.median(seconds) * 1e3), f"{statistics.median(ratios):.2f}"]
        rows.append(Row(name=name, kind=kind(name), cells=cells))
    return Report(
        title="the first two swaps of a process: GPT-2",
        columns=["first, ms", "÷ ema", "second, ms", "÷ ema"],
        rows=rows,
        rounds=rounds,
    )


def first_swaps(name: str, setting: Setting) -> list[float]:
    """Seconds of the first two swaps in and out of this process."""
    contender = Contender(name, swap_of(name, gpt2(setting)))
    return measure([contender], Effort(rounds=2), setting.finish)[name]
