"""The combination of stored averages that comes closest to another average.

Weights move like a random walk, so averages are close where their *tails* are. With the tails
``F_a`` of the sources and ``F`` of the target, the coefficients solve::

    minimize  Σ_i (Σ_a c_a · F_a,i − F_i)²   over steps i,   where  Σ_a c_a = 1

The normal equations would square the condition of the problem. A factor matrix of tails, one row
for each node and one column for each source, keeps it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import final

import numpy as np

from ema.errors import ArgumentError
from ema.profiles.nodes import integral_nodes, sum_nodes
from ema.profiles.profile import Floats, Profile

__all__ = ["Combination", "combine"]

_ROUNDING = 2.0**-24
"""Relative error of a number that is stored as float32."""


@final
@dataclasses.dataclass(frozen=True, eq=False)
class Combination:
    """Coefficients of stored averages, and how close they come to the target.

    Attributes:
        coefficients: one for each source, in the order given; they sum to 1.
        residual: relative distance from the target if all steps move alike and independently:
            the root of ``Σ (Σ_a c_a · F_a − F)² / Σ F²``.
        initial_share: share of the initial weights in the combination.
    """

    coefficients: Floats
    residual: float
    initial_share: float

    @property
    def storage_error(self) -> float:
        """Relative error by the rounding of the sources to float32: ``‖c‖₂ · 2⁻²⁴``."""
        return float(np.linalg.norm(self.coefficients)) * _ROUNDING


def combine(
    sources: Sequence[Profile], target: Profile, *, continuous: bool = False
) -> Combination:
    """The combination of ``sources`` whose tail is closest to that of ``target``.

    Sources later than the target have coefficient 0. The initial weights (``Checkpoint(0)``) take
    part only where another source or the target has a share of them: otherwise they would free the
    sum of the other coefficients, and averages get worse. A source that equals the target is the
    whole combination.

    Source: Karras et al. 2024, arXiv:2312.02696, appendix C, with tails in place of responses and
    the sum of the coefficients as a constraint.

    Args:
        sources: profiles of the stored averages.
        target: profile of the wanted average.
        continuous: compare over continuous time, which suits profiles with a formula. The default
            compares over the steps of a run.

    Raises:
        ArgumentError: the target is later than all sources; fewer than two sources can take part;
            or a step is not an integer although the comparison is over steps.

    >>> from ema.profiles import Checkpoint, profile_of
    >>> found = combine([Checkpoint(1), Checkpoint(2)], profile_of(0.25, 2, update_after_step=1))
    >>> found.coefficients.round(12)
    array([0.25, 0.75])
    """
    last = max((source.step for source in sources), default=0)
    if not target.step <= last:
        raise ArgumentError(
            f"`target` must not be later than the last of `sources` (step {last:g}),"
            f" got step {target.step:g}"
        )
    used = _taking_part(sources, target)
    profiles = [sources[index] for index in used]
    times, counts = _nodes([*profiles, target], continuous=continuous)
    roots = np.sqrt(counts)
    tails = np.stack([roots * source.tail_at(times) for source in profiles], axis=1)
    wanted = roots * target.tail_at(times)
    found = _equal(profiles, tails, target, wanted)
    if found is None:
        if len(used) < 2:
            raise ArgumentError(
                "`sources` must hold at least two that can take part up to step"
                f" {target.step:g} of `target`, got {len(used)}"
            )
        found = _constrained(tails, wanted)
    coefficients = np.zeros(len(sources))
    coefficients[used] = found
    distance, size = np.linalg.norm(tails @ found - wanted), np.linalg.norm(wanted)
    return Combination(
        coefficients=coefficients,
        residual=float(distance / size) if size else math.inf if distance else 0.0,
        initial_share=float(found @ [source.initial_share for source in profiles]),
    )


def _taking_part(sources: Sequence[Profile], target: Profile) -> list[int]:
    """Indices of the sources up to the target, without initial weights that are not needed."""
    early = [index for index, source in enumerate(sources) if source.step <= target.step]
    later = [index for index in early if sources[index].step > 0]
    shares = (target.initial_share, *(sources[index].initial_share for index in later))
    # float32 rounds a smaller share away
    return early if max(shares) > _ROUNDING else later


def _nodes(profiles: Sequence[Profile], *, continuous: bool) -> tuple[Floats, Floats]:
    edges = {edge for profile in profiles for edge in profile.breaks}
    if continuous:
        return integral_nodes(edges or {1.0})
    for edge in edges:
        if edge != int(edge):
            raise ArgumentError(
                f"a comparison over steps needs profiles of whole steps, got {edge:g}:"
                " pass `continuous=True`"
            )
    return sum_nodes([int(edge) for edge in edges or {1.0}])


def _equal(
    profiles: Sequence[Profile], tails: Floats, target: Profile, wanted: Floats
) -> Floats | None:
    """All of the source with the memory of the target, the latest of several; None without one."""
    equal = [
        index
        for index, source in enumerate(profiles)
        if source.initial_share == target.initial_share and np.array_equal(tails[:, index], wanted)
    ]
    if not equal:
        return None
    found = np.zeros(len(profiles))
    found[max(equal, key=lambda index: profiles[index].step)] = 1.0
    return found


def _constrained(factor: Floats, wanted: Floats) -> Floats:
    """Least squares under ``Σ c = 1``, which the last coefficient fulfills."""
    last = factor[:, -1]
    others, *_ = np.linalg.lstsq(factor[:, :-1] - last[:, None], wanted - last, rcond=None)
    return np.append(others, 1.0 - others.sum())
