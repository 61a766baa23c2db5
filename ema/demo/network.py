"""Everything that both runs share: the shape of the network, its first weights, the optimizer.

Two convolutions of stride 2 (8×8 → 4×4 → 2×2 pixels) and a linear layer.
"""

from __future__ import annotations

import numpy as np

from ema.demo.data import Floats

__all__ = ["BATCH_SIZE", "CHANNELS", "CLASSES", "LEARNING_RATE", "WEIGHT_DECAY", "first_weights"]

CHANNELS = (1, 16, 32)
CLASSES = 10

# A small batch and a high learning rate: the last weights are a noisy sample around a better point.
BATCH_SIZE = 8
LEARNING_RATE = 0.02
WEIGHT_DECAY = 0.0  # torch and optax differ in what they decay


def first_weights() -> dict[str, Floats]:
    """Name to array, in the layout of Flax: height, width, in, out.

    He initialization: variance 2 / inputs of a unit, and biases of zero.
    """
    rng = np.random.default_rng(2)
    shapes = {
        "conv1": (3, 3, CHANNELS[0], CHANNELS[1]),
        "conv2": (3, 3, CHANNELS[1], CHANNELS[2]),
        "head": (2 * 2 * CHANNELS[2], CLASSES),
    }
    weights: dict[str, Floats] = {}
    for name, shape in shapes.items():
        scale = np.sqrt(2 / np.prod(shape[:-1]))
        weights[f"{name}.kernel"] = (scale * rng.normal(size=shape)).astype(np.float32)
        weights[f"{name}.bias"] = np.zeros(shape[-1], np.float32)
    return weights
