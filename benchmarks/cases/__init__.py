"""The cases by name; a new one is a function ``(Setting) -> Case`` in a module here and its line.

They are named by strings, so that a case is imported only in the process that measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from benchmarks.measure import Case
from benchmarks.setting import Setting

__all__ = ["CASES", "build"]

CASES: Mapping[str, str] = {
    "many-small": "many_small.build",
    "many-small-modules": "many_small.build_modules",
    "gpt2": "gpt2.build",
    "one-tensor": "one_tensor.build",
    "mixed": "one_tensor.build_mixed",
    "bfloat16": "one_tensor.build_bfloat16",
    "compensated": "one_tensor.build_compensated",
    "nonfinite": "gpt2.build_nonfinite",
    "many-tensors": "many_tensors.build",
    "swap": "swap.build",
    "training-step": "training_step.build",
    "training-step-short": "training_step.build_short",
    "jax-step": "jax_step.build",
    "jax-step-sgd": "jax_step.build_sgd",
    "jax-scan": "jax_scan.build",
    "jax-scan-small": "jax_scan.build_small",
    "save": "files.build_save",
    "load": "files.build_load",
}


def build(name: str, setting: Setting) -> Case:
    """Make the contenders of a case."""
    module, _, function = CASES[name].partition(".")
    return getattr(import_module(f"benchmarks.cases.{module}"), function)(setting)
