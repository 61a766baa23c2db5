"""What XLA itself says that the average costs, in bytes a parameter; speed is in benchmarks/."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from ema.jax_backend import params_ema

SIZE = 1 << 18
SHAPES = [(SIZE,), (512, SIZE // 512)] * 2


def compiled(tx):
    """Bytes a parameter that one donated step moves, needs for a while, and holds as its state."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES]
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # optax's adamw mixes dtypes itself
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    program, numbers = lowered.compile(), SIZE * len(SHAPES)
    memory = program.memory_analysis()
    return (
        program.cost_analysis()["bytes accessed"] / numbers,
        memory.temp_size_in_bytes / numbers,
        memory.alias_size_in_bytes / numbers,
    )


@pytest.mark.parametrize("base", [optax.sgd(0.1), optax.adamw(1e-3)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("averages", [1, 2])
@pytest.mark.parametrize("every", [1, 10])
def test_an_average_adds_twelve_bytes_and_no_temporary(base, averages, every):
    """Read it, write it, read the new parameter; one copy is held, and donated in place."""
    decays = {str(k): 0.9 for k in range(averages)}
    moved, temporary, held = compiled(base)
    tx = optax.chain(base, params_ema(decays, update_every=every))
    more_moved, more_temporary, more_held = compiled(tx)
    assert more_moved - moved <= 12.01 * averages
    assert more_temporary - temporary < 0.01
    assert abs(more_held - held - 4 * averages) < 0.01
