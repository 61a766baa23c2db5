"""A model of ordinary size: what memory costs."""

from __future__ import annotations

from benchmarks.limits import bare_foreach, flat_copy, flat_lerp
from benchmarks.measure import Case
from benchmarks.models import gpt2, size
from benchmarks.peers import updates

__all__ = ["build"]


def build(*, quick: bool) -> Case:
    model = gpt2(quick=quick)
    return Case(
        title=f"one update: GPT-2, {size(model)}",
        contenders=[
            *updates(model),
            bare_foreach(model),
            flat_lerp(model),
            flat_copy(model, times=1),
        ],
        references=["bare foreach", "flat lerp"],
    )
