"""One case, from its name to its report.

A module beside ``__main__``, so that a new process can import it.
"""

from __future__ import annotations

import dataclasses

from benchmarks.cases import build
from benchmarks.many_in_a_file import MANY_IN_A_FILE, measure_many
from benchmarks.measure import Effort, measure
from benchmarks.memory import MEMORY, measure_memory
from benchmarks.process import in_fresh_process
from benchmarks.report import Report, of_times
from benchmarks.setting import Setting

__all__ = ["EFFORTS", "run", "times"]

ON_ACCELERATOR = 5.0
"""Seconds for all rounds of a case there: nothing else disturbs them."""

EFFORTS = {
    "full": Effort(rounds=40, seconds=12),
    "quick": Effort(rounds=10, seconds=3),
    "tiny": Effort(rounds=1, seconds=0, sample=0),
}


def run(name: str, setting: Setting) -> Report:
    """Measure a case in a fresh process, or several."""
    if name in MEMORY:
        return measure_memory(name, setting)
    if name == MANY_IN_A_FILE:
        return measure_many(setting)
    return in_fresh_process(times, name, setting)


def times(name: str, setting: Setting) -> Report:
    """Measure a case in this process."""
    case, effort = build(name, setting), EFFORTS[setting.size]
    if not setting.on_cpu:
        effort = dataclasses.replace(effort, seconds=min(effort.seconds, ON_ACCELERATOR))
    return of_times(case, measure(case, effort))
