"""100 000 steps: the two backends have the same bits to the end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import ema
from ema.jax_backend import get_params_ema, params_ema
from ema.torch_backend import EMAModel

STEPS, LOOKS = 100_000, 100
SCHEDULES = {
    "mean": ema.UniformAverage(),
    "teacher": ema.CosineDecay(start=0.99, end=1.0, total_steps=STEPS),
    "short": ema.ConstantDecay(decay=0.99),
    "long": ema.HalfLife(steps=10_000),
}


def jax_run():
    """Parameters of every step, and the averages at every look, from one scan."""
    tx = optax.chain(optax.sgd(0.01), params_ema(SCHEDULES))
    start = jnp.linspace(-1.0, 1.0, 16, dtype=jnp.float32)
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(STEPS, 16)), jnp.float32)

    def step(carry, noise):
        params, state = carry
        updates, state = tx.update(0.3 * params + noise, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    def look(carry, noise):
        carry, history = jax.lax.scan(step, carry, noise)
        return carry, (history, {name: get_params_ema(carry[1], name=name) for name in SCHEDULES})

    chunks = noise.reshape(LOOKS, STEPS // LOOKS, 16)
    _, (history, averages) = jax.jit(lambda n: jax.lax.scan(look, (start, tx.init(start)), n))(
        chunks
    )
    return np.asarray(start), np.asarray(history).reshape(STEPS, 16), averages


@pytest.mark.slow
def test_several_averages_over_100_000_steps():
    """One transform of four averages against one EMAModel of four; no element differs."""
    start, history, expected = jax_run()
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor(start))})
    ema_model = EMAModel(model, SCHEDULES)
    sequence = torch.from_numpy(history.copy())
    differing = dict.fromkeys(SCHEDULES, 0)
    for step in range(STEPS):
        with torch.no_grad():
            model["w"].copy_(sequence[step])
        ema_model.update()
        look, rest = divmod(step + 1, STEPS // LOOKS)
        if rest == 0:
            for name in SCHEDULES:
                average = ema_model.averaged_parameters(name)["w"].detach().numpy()
                theirs = np.asarray(expected[name][look - 1])
                differing[name] += np.count_nonzero(average != theirs)
    assert differing == dict.fromkeys(SCHEDULES, 0)
    assert np.abs(history).min() > np.finfo(np.float32).tiny  # no subnormals, which XLA flushes
    reference = history.astype(np.float64).mean(0)
    np.testing.assert_allclose(
        ema_model.averaged_parameters("mean")["w"].detach().numpy(), reference, atol=2e-6
    )
