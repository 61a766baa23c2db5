"""Many small tensors: what a call costs, not what memory costs."""

from __future__ import annotations

from torch import nn

from benchmarks.limits import Flat, bare_foreach
from benchmarks.measure import Case
from benchmarks.models import count, many_small, many_small_modules, size
from benchmarks.peers import updates
from benchmarks.setting import Setting

__all__ = ["build", "build_modules"]


def build(setting: Setting) -> Case:
    model = many_small(setting)
    return _case(f"one update: {size(model)}, one ParameterList", model, setting)


def build_modules(setting: Setting) -> Case:
    model = many_small_modules(setting)
    return _case(f"one update: {size(model)}, {len(list(model))} LayerNorms", model, setting)


def _case(title: str, model: nn.Module, setting: Setting) -> Case:
    flat = Flat(count(model), setting)
    return Case(
        title=title,
        contenders=[*updates(model), bare_foreach(model), flat.lerp()],
        references=["bare foreach", "ema"],
        finish=setting.finish,
        note="Bar: ema at most 0.7 of bare foreach, and the best peer at 6 times ema.",
    )
