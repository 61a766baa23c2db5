"""The handwritten digits that scikit-learn ships, split, and the batches that both runs see."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ema.extras import require

__all__ = ["Digits", "Floats", "Ints", "batches", "load"]

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int32]

_HELD_OUT = 597  # of 1797
_WRONG_LABELS = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """Images of shape (n, 8, 8, 1) in [0, 1] and their labels, 0 to 9."""

    images: Floats
    labels: Ints


def load() -> tuple[Digits, Digits]:
    """Training digits, a tenth of them with a wrong label, and held-out ones, all with the right.

    The wrong labels are there for the noise: they pull the weights about, as hard examples do in a
    larger task, and averaging has something to smooth.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    require("sklearn", "demo")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    images = (pixels[order].reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    labels = labels[order].astype(np.int32)

    held_out = Digits(images=images[:_HELD_OUT], labels=labels[:_HELD_OUT])
    labels = labels[_HELD_OUT:]
    wrong = rng.random(len(labels)) < _WRONG_LABELS
    shift = rng.integers(1, 10, len(labels), dtype=np.int32)
    noisy = np.where(wrong, (labels + shift) % 10, labels)
    return Digits(images=images[_HELD_OUT:], labels=noisy), held_out


def batches(digits: Digits, steps: int, size: int) -> Iterator[Digits]:
    """The same random batches on each call, ``steps`` of them, drawn with replacement."""
    rng = np.random.default_rng(1)
    for _ in range(steps):
        chosen = rng.integers(len(digits.labels), size=size)
        yield Digits(images=digits.images[chosen], labels=digits.labels[chosen])
