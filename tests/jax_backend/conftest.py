"""What the JAX tests share: strict promotion, a small model, and the float64 oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    """Every test runs under strict dtype promotion unless it says otherwise."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def params():
    """A small tree; 21 elements."""
    rng = np.random.default_rng(0)
    return {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)},
        "bias": jnp.asarray(rng.normal(size=5), jnp.float32),
    }


@pytest.fixture
def grads():
    """``grads(params, k)``: the gradients of step ``k``, the same on each call."""

    def of_step(params, k):
        key = jax.random.fold_in(jax.random.key(7), k)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten(
            [
                jax.random.normal(keys[i], leaf.shape, jnp.float32).astype(leaf.dtype)
                for i, leaf in enumerate(leaves)
            ]
        )

    return of_step


@pytest.fixture
def train(grads):
    """``train(tx, params, steps)``: the last optimizer state and the params after each step."""

    def run(tx, params, steps):
        @jax.jit
        def step(params, opt_state, k):
            updates, opt_state = tx.update(grads(params, k), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        opt_state = tx.init(params)
        history = []
        for k in range(steps):
            params, opt_state = step(params, opt_state, k)
            history.append(params)
        return opt_state, history

    return run


@pytest.fixture
def oracle():
    """The recursion in float64 NumPy, ``decay · average + (1 − decay) · params``.

    ``decay(n, t)`` answers for the update number ``n`` after ``t`` steps.
    """

    def average(start, history, decay, update_every=1, update_after_step=0):
        def leaf(first, *rest):
            result = np.asarray(first, np.float64)
            for step, live in enumerate(rest, start=1):
                elapsed = step - update_after_step
                value = np.asarray(live.astype(jnp.float32), np.float64)
                if elapsed <= 0:
                    result = value
                elif elapsed % update_every == 0:
                    d = decay(elapsed // update_every, elapsed)
                    result = d * result + (1.0 - d) * value
            return result

        return jax.tree.map(leaf, start, *history)

    return average


@pytest.fixture
def relative_error():
    """Largest |Δ| over largest |reference| of the leaves of a tree."""

    def error(average, reference):
        pairs = zip(jax.tree.leaves(average), jax.tree.leaves(reference), strict=True)
        return max(
            np.max(np.abs(np.asarray(a, np.float64) - r)) / np.max(np.abs(r)) for a, r in pairs
        )

    return error
