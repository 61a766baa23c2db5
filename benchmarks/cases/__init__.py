"""The cases by name.

A case is a function of a :class:`~benchmarks.setting.Setting` in a module here, and a line in one of the
two tables. It returns contenders, which :mod:`benchmarks.timing` times in a fresh process, or a report that
it has measured itself. Cases are named by strings, so that the module of a case is imported only in the
process that measures it.
"""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

from benchmarks.report import Report, of_times
from benchmarks.setting import Setting, in_fresh_process
from benchmarks.timing import Effort, measure

__all__ = ["NAMES", "REPORTED", "SHOWN", "TIMED", "run", "times"]

TIMED = {
    "many-small": "updates.many_small_vectors",
    "many-small-modules": "updates.many_small_modules",
    "gpt2": "updates.gpt2_model",
    "one-tensor": "updates.one_vector",
    "mixed": "updates.mixed",
    "bfloat16": "updates.bfloat16",
    "compensated": "updates.compensated",
    "nonfinite": "updates.nonfinite",
    "many-tensors": "updates.many_tensors",
    "swap": "swaps.repeated",
    "training-step": "training.step",
    "training-step-short": "training.short_step",
    "trainer": "training.trainer",
    "jax-step": "jax_steps.adamw",
    "jax-step-sgd": "jax_steps.sgd",
    "jax-scan": "jax_steps.scan",
    "jax-scan-small": "jax_steps.small_scan",
    "save": "files.save",
    "load": "files.load",
}
"""Cases whose contenders are timed in turn."""

REPORTED = {
    "memory-update": "peaks.of_updates",
    "memory-swap": "peaks.of_swaps",
    "many-in-a-file": "files.many_in_a_file",
    "first-swap": "swaps.first",
    "scaling": "scaling.scaling",
    "kernels": "kernels.kernels_of_sizes",
}
"""Cases that measure in several processes, or something other than the time of a call."""

NAMES = [*TIMED, *REPORTED]
SHOWN = [name for name in NAMES if name not in {"trainer", "first-swap", "scaling", "kernels"}]
"""The cases whose tables are in ``docs/benchmarks.md``."""

EFFORTS = {
    "full": Effort(rounds=40, seconds=12, sample=0.01),
    "quick": Effort(rounds=10, seconds=3, sample=0.01),
    "tiny": Effort(rounds=1),
}
ON_ACCELERATOR = 5.0
"""Seconds for all rounds of a case there, because nothing else disturbs them."""


def run(name: str, setting: Setting) -> Report:
    """Measure a case, in fresh processes."""
    if name in TIMED:
        return in_fresh_process(times, name, setting)
    report: Report = _function(REPORTED[name])(setting)
    return report


def times(name: str, setting: Setting) -> Report:
    """Measure a case of :data:`TIMED` in this process."""
    case, effort = _function(TIMED[name])(setting), EFFORTS[setting.size]
    if not setting.on_cpu:
        effort = dataclasses.replace(effort, seconds=min(effort.seconds, ON_ACCELERATOR))
    return of_times(case, measure(case.contenders, effort, setting.finish))


def _function(path: str) -> Any:
    module, _, name = path.partition(".")
    return getattr(import_module(f"benchmarks.cases.{module}"), name)
