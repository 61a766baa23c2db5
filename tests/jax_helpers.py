"""Runs and comparisons that the JAX tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.oracle import averages

__all__ = ["grads", "oracle", "relative_error", "train"]


def grads(params: Any, k: Any) -> Any:
    """The gradients of step ``k``, the same on each call."""
    key = jax.random.fold_in(jax.random.key(7), k)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [
            jax.random.normal(keys[i], leaf.shape, jnp.float32).astype(leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
    )


def train(tx: optax.GradientTransformation, params: Any, steps: int) -> tuple[Any, list[Any]]:
    """The last optimizer state, and the params after each step."""

    @jax.jit
    def step(params: Any, opt_state: Any, k: Any) -> Any:
        updates, opt_state = tx.update(grads(params, k), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    history = []
    for k in range(steps):
        params, opt_state = step(params, opt_state, k)
        history.append(params)
    return opt_state, history


def oracle(
    start: Any,
    history: list[Any],
    decay: Callable[[int, int], float],
    update_every: int = 1,
    update_after_step: int = 0,
) -> Any:
    """The last average of each leaf in float64; ``decay(n, t)`` of the update ``n`` after ``t`` steps."""

    def leaf(first: Any, *rest: Any) -> Any:
        *_, last = averages(
            first,
            [live.astype(jnp.float32) for live in rest],
            lambda n, t: 1.0 - decay(n, t),
            update_after_step=update_after_step,
            update_every=update_every,
        )
        return last

    return jax.tree.map(leaf, start, *history)


def relative_error(average: Any, reference: Any) -> float:
    """Largest |Δ| over largest |reference| of the leaves of a tree."""
    pairs = zip(jax.tree.leaves(average), jax.tree.leaves(reference), strict=True)
    return max(np.max(np.abs(np.asarray(a, np.float64) - r)) / np.max(np.abs(r)) for a, r in pairs)
