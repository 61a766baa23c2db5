"""Resources of the JAX tests: strict promotion and a small model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
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
