"""The average into the model and the live weights back, as around every evaluation.

Without ``assign`` parameters keep their memory. Exchanging two tensors reads and writes both, 16 bytes an element, and there are two exchanges; a
flat copy moves 8 bytes an element. Four of those are the limit.
"""

from __future__ import annotations

from benchmarks.limits import Flat
from benchmarks.measure import Case
from benchmarks.models import count, gpt2, size
from benchmarks.peers import swaps
from benchmarks.setting import Setting

__all__ = ["build"]


def build(setting: Setting) -> Case:
    model = gpt2(setting)
    return Case(
        title=f"swap in and out: GPT-2, {size(model)}",
        contenders=[*swaps(model), Flat(count(model), setting).copy(times=4)],
        references=["4 flat copies", "ema"],
        finish=setting.finish,
        traffic=32 * count(model),
        note="Bar: diffusers at 2 times ema. Assigned, parameters refer to the averages and nothing is moved.",
    )
