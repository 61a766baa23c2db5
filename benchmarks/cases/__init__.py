"""The cases by name; a new one is a module here and a line in ``CASES``.

A case is made by ``build(quick=…)`` in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.cases import files, gpt2, jax_step, many_small, swap
from benchmarks.measure import Case

__all__ = ["CASES"]

CASES: Mapping[str, Callable[..., Case]] = {
    "many-small": many_small.build,
    "many-small-modules": many_small.build_modules,
    "gpt2": gpt2.build,
    "swap": swap.build,
    "jax-step": jax_step.build,
    "jax-step-sgd": jax_step.build_sgd,
    "save": files.build_save,
    "load": files.build_load,
}
