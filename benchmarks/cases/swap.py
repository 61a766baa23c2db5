"""The average into the model and the live weights back, as around every evaluation.

Exchanging two tensors reads and writes both, 16 bytes an element, and there are two exchanges; a
flat copy moves 8 bytes an element. Four of those are the limit.
"""

from __future__ import annotations

from benchmarks.limits import flat_copy
from benchmarks.measure import Case
from benchmarks.models import gpt2, size
from benchmarks.peers import swaps

__all__ = ["build"]


def build(*, quick: bool) -> Case:
    model = gpt2(quick=quick)
    return Case(
        title=f"swap in and out: GPT-2, {size(model)}",
        contenders=[*swaps(model), flat_copy(model, times=4)],
        references=["4 flat copies"],
    )
