"""A case in a process of its own.

What an earlier case has freed stays with the allocator, and then the copies that some peers make in
every call cost as little as half of what they cost in a new process. A module beside ``__main__``,
so that the new process can import it.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from benchmarks.cases import CASES
from benchmarks.measure import Case, Effort, Measurement, measure

__all__ = ["in_fresh_process"]


def in_fresh_process(name: str, *, quick: bool) -> tuple[Case, list[Measurement]]:
    """Build and measure a case; it comes back without its contenders."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as executor:
        return executor.submit(_run, name, quick=quick).result()


def _run(name: str, *, quick: bool) -> tuple[Case, list[Measurement]]:
    case = CASES[name](quick=quick)
    rows = measure(case, Effort(rounds=10 if quick else 40))
    return dataclasses.replace(case, contenders=()), rows
