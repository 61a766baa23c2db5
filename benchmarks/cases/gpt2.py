"""A model of ordinary size: what memory costs; and what it costs to look for NaN and Inf."""

from __future__ import annotations

from benchmarks.limits import Flat, bare_foreach
from benchmarks.measure import Case
from benchmarks.models import count, gpt2, size
from benchmarks.peers import ONE_BY_ONE, ours, updates
from benchmarks.setting import Setting

__all__ = ["build", "build_nonfinite"]


def build(setting: Setting) -> Case:
    model = gpt2(setting)
    flat = Flat(count(model), setting)
    return Case(
        title=f"one update: GPT-2, {size(model)}",
        contenders=[
            *updates(model, without=() if setting.on_cpu else ONE_BY_ONE),
            bare_foreach(model),
            flat.lerp(),
            flat.copy(),
        ],
        references=["flat lerp", "bare foreach"],
        finish=setting.finish,
        traffic=12 * count(model),
        note="Bar: ema at most 1.05 of flat lerp.",
    )


def build_nonfinite(setting: Setting) -> Case:
    model = gpt2(setting)
    flat = Flat(count(model), setting)
    return Case(
        title=f"one update that looks for NaN and Inf: GPT-2, {size(model)}",
        contenders=[
            ours(model),
            ours(model, 'ema, on_nonfinite="skip"', on_nonfinite="skip"),
            flat.lerp(),
        ],
        references=["flat lerp", "ema"],
        finish=setting.finish,
        traffic=12 * count(model),
    )
