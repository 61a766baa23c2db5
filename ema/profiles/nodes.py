"""Few times and weights that stand for all steps of a run, or for all of its time.

Tails are smooth between the steps at which one of them jumps or bends. On such a piece 40 Gauss nodes
give the same result as a sum over all steps, so the cost does not depend on the length of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np

from ema.profiles.profile import Floats

__all__ = ["integral_nodes", "sum_nodes"]

_NODES = 40
"""Nodes in a piece; sums and integrals of polynomials up to degree 79 are exact."""
_HALVINGS = 8
"""Halvings of the first interval towards 0, where a fractional power of the time is not smooth."""
_LONGEST = 256
"""A longer piece is halved towards its end, because some averages remember few steps."""


def integral_nodes(edges: Iterable[float]) -> tuple[Floats, Floats]:
    """Times and weights with ``Σ weight · f(time) ≈ ∫ f(τ) dτ`` from 0 to the last edge.

    Gauss–Legendre nodes, 40 on each interval between neighboring edges; the first interval is
    halved eight times towards 0.

    Args:
        edges: times above 0 between which ``f`` is smooth, in any order.

    Returns:
        Two arrays of length ``40 · (number of different edges + 8)``.
    """
    ends = np.array(sorted(set(edges)), np.float64)
    ends = np.concatenate([ends[0] * 0.5 ** np.arange(_HALVINGS, 0, -1), ends])
    starts = np.concatenate([[0.0], ends[:-1]])
    lengths = (ends - starts)[:, None]
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    times = starts[:, None] + lengths * (0.5 * (nodes + 1.0))
    return times.ravel(), (lengths * (0.5 * weights)).ravel()


def sum_nodes(edges: Iterable[int]) -> tuple[Floats, Floats]:
    """Times and weights with ``Σ weight · f(time) ≈ Σ_i f(i − ½)`` over steps 1 to the last edge.

    A piece of at most 40 steps has a node at each of them. In longer pieces the nodes are the
    zeros of the 40th Gram polynomial, which is to a sum over steps what the Legendre polynomial is
    to an integral; the two agree in the limit of long pieces.

    Source: Gautschi 2004, "Orthogonal Polynomials: Computation and Approximation", section 1.5.

    Args:
        edges: steps above 0 between which ``f`` is smooth, in any order.
    """
    ends = sorted(set(edges))
    ends = sorted({ends[0] >> halvings for halvings in range(1, _HALVINGS + 1)} - {0}) + ends
    times, weights, start = [], [], 0
    for end in ends:
        while start < end:
            middle = (start + end + 1) // 2
            stop = middle if end - start > _LONGEST else end
            positions, counts = _gram(stop - start)
            times.append(start + 0.5 + positions)
            weights.append(counts)
            start = stop
    return np.concatenate(times), np.concatenate(weights)


@functools.lru_cache(maxsize=4096)
def _gram(steps: int) -> tuple[Floats, Floats]:
    """Gauss nodes and weights for a sum over ``0, 1, …, steps − 1``.

    They come from the eigenvalues of the Jacobi matrix of the Gram polynomials, whose recurrence
    has the coefficients ``k² (N² − k²) / (4 (4k² − 1))`` (Golub and Welsch 1969).
    """
    if steps <= _NODES:
        return np.arange(steps, dtype=np.float64), np.ones(steps)
    k = np.arange(1.0, _NODES)
    beside = np.sqrt(k * k * (steps - k) * (steps + k) / (4.0 * (4.0 * k * k - 1.0)))
    positions, vectors = np.linalg.eigh(np.diag(beside, 1) + np.diag(beside, -1))
    return positions + 0.5 * (steps - 1), steps * vectors[0] ** 2
