"""One large tensor: in float32, in two dtypes, with random rounding, with a remainder."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.limits import WEIGHT, Flat
from benchmarks.measure import Case, Contender
from benchmarks.models import count, one_tensor, size
from benchmarks.peers import FOREACH, ours, timm, updates
from benchmarks.setting import Setting

__all__ = ["build", "build_bfloat16", "build_compensated", "build_mixed"]

ELEMENTS = 2**26


def build(setting: Setting) -> Case:
    model = one_tensor(setting.elements(ELEMENTS, copies=12), setting)
    flat = Flat(count(model), setting)
    return Case(
        title=f"one update: {size(model)}",
        contenders=[*updates(model, without=FOREACH), flat.lerp(), flat.copy()],
        references=["flat lerp"],
        finish=setting.finish,
        traffic=12 * count(model),
    )


def build_mixed(setting: Setting) -> Case:
    model = one_tensor(setting.elements(ELEMENTS, copies=12), setting, torch.bfloat16)
    flat = Flat(count(model), setting)
    return Case(
        title=f"one update of a float32 average: {size(model)}",
        contenders=[
            *updates(model, torch.float32, without=FOREACH),
            *_by_hand(model),
            flat.lerp(),
            flat.copy(),
        ],
        references=["flat lerp", "ema"],
        finish=setting.finish,
        traffic=10 * count(model),
        note="Flat lerp is float32 in both. Bar: ema at most 1.3 of it, and the best peer at 4"
        " times ema.",
    )


def build_bfloat16(setting: Setting) -> Case:
    model = one_tensor(setting.elements(ELEMENTS // 2, copies=12), setting, torch.bfloat16)
    flat, small = (Flat(count(model), setting, d) for d in (torch.float32, torch.bfloat16))
    plain = timm(model, None, stochastic_rounding=False)
    return Case(
        title=f"one update of a bfloat16 average: {size(model)}",
        contenders=[
            ours(model, "ema, stochastic rounding", dtype=torch.bfloat16),
            Contender(name="timm, stochastic rounding", call=timm(model, None)),
            Contender(name="timm, to nearest: never moves", call=plain),
            small.lerp("flat lerp of bfloat16"),
            flat.lerp("flat lerp of float32"),
            small.copy(),
        ],
        references=["flat lerp of float32", "ema, stochastic rounding"],
        finish=setting.finish,
        traffic=6 * count(model),
        note="Bar: timm with stochastic rounding at 8 times ema.",
    )


def build_compensated(setting: Setting) -> Case:
    model = one_tensor(setting.elements(ELEMENTS, copies=8), setting)
    flat = Flat(count(model), setting)
    return Case(
        title=f"one update with a remainder: {size(model)}",
        contenders=[
            ours(model),
            ours(model, "ema, compensated", compensated=True, traffic=20 * count(model)),
            flat.lerp(),
            flat.copy(),
        ],
        references=["flat lerp"],
        finish=setting.finish,
        traffic=12 * count(model),
        note="The remainder is read and written too: 20 bytes in place of 12, 1.67 of flat lerp.",
    )


def _by_hand(model: nn.Module) -> list[Contender]:
    """The two lines that people write; both on one average."""
    (params,) = (p.detach() for p in model.parameters())
    average = params.float()
    return [
        Contender(
            name="by hand: lerp_(p.float())",
            call=lambda: average.lerp_(params.float(), WEIGHT),
        ),
        Contender(
            name="by hand: mul_, add_",
            call=lambda: average.mul_(1 - WEIGHT).add_(params, alpha=WEIGHT),
        ),
    ]
