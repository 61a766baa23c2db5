"""The result of a run: its scores on the held-out digits and the trajectory of its weights."""

from __future__ import annotations

import dataclasses

import numpy as np

from ema.demo.data import Floats, Ints

__all__ = ["Run", "Score", "is_due", "score"]

_EVALUATIONS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """On the held-out digits."""

    loss: float
    """Mean cross-entropy in nats."""
    accuracy: float
    """Share of right answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run of one backend."""

    backend: str
    loop: str
    """The program that trained it."""
    steps: list[int] = dataclasses.field(default_factory=list)
    """When it was scored."""
    live: list[Score] = dataclasses.field(default_factory=list)
    averaged: list[Score] = dataclasses.field(default_factory=list)
    params: list[dict[str, Floats]] = dataclasses.field(default_factory=list)
    """Name to array, before the first step and after every one; names and layout are its own."""


def score(logits: Floats, labels: Ints) -> Score:
    """Loss and accuracy, in float64 and the same for both backends.

    Args:
        logits: shape (n, classes).
        labels: shape (n,).
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    likelihood = shifted[np.arange(len(labels)), labels] - np.log(np.exp(shifted).sum(axis=1))
    return Score(
        loss=float(-likelihood.mean()),
        accuracy=float((logits.argmax(axis=1) == labels).mean()),
    )


def is_due(step: int, steps: int) -> bool:
    """Whether a run of ``steps`` steps is scored after this one."""
    return step % max(1, steps // _EVALUATIONS) == 0 or step in {1, steps}
