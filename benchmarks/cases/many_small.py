"""Many small tensors: what a call costs, not what memory costs."""

from __future__ import annotations

from torch import nn

from benchmarks.limits import bare_foreach, flat_lerp
from benchmarks.measure import Case
from benchmarks.models import many_small, many_small_modules
from benchmarks.peers import updates

__all__ = ["build", "build_modules"]


def build(*, quick: bool) -> Case:
    del quick  # small as it is
    return _case("one update: 1 000 × 256 float32 in one ParameterList", many_small())


def build_modules(*, quick: bool) -> Case:
    del quick
    return _case("one update: 1 000 × 256 float32 in 500 LayerNorms", many_small_modules())


def _case(title: str, model: nn.Module) -> Case:
    return Case(
        title=title,
        contenders=[*updates(model), bare_foreach(model), flat_lerp(model)],
        references=["bare foreach"],
    )
