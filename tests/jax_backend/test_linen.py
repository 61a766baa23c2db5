"""``EMATrainState``: trained under jit, called with the averages, saved and restored."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization, struct

import ema
from ema.jax_backend import get_params_ema, params_ema
from ema.jax_backend.linen import EMATrainState

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))


def create(cls=EMATrainState, decay=0.5, **options):
    model = Network()
    variables = model.init(jax.random.key(0), X, train=False)
    return cls.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.chain(optax.sgd(0.1), params_ema(decay)),
        **options,
    )


@jax.jit
def step(state, x):
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        y, mutated = state.apply_fn(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean(y**2), mutated["batch_stats"]

    grads, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


@pytest.mark.parametrize("averaged", [False, True])
def test_params_are_averaged_and_statistics_by_option(averaged):
    state = create(batch_stats_tx=params_ema(0.25) if averaged else None)
    params, stats = state.params, state.batch_stats
    for k in range(3):
        state = step(state, X + jnp.float32(k))
        params = jax.tree.map(lambda a, p: 0.5 * a + 0.5 * p, params, state.params)
        stats = jax.tree.map(lambda a, s: 0.25 * a + 0.75 * s, stats, state.batch_stats)
    close(state.ema_params, params)
    close(state.ema_batch_stats, stats if averaged else state.batch_stats)
    assert int(state.step) == 3
    expected = {"params": params, "batch_stats": stats if averaged else state.batch_stats}
    np.testing.assert_allclose(
        state.apply_fn(state.ema_variables, X, train=False),
        Network().apply(expected, X, train=False),
        rtol=1e-5,
    )


def test_one_of_several():
    state = create(decay={"short": 0.0, "long": 1.0}, ema_name="short")
    first = state.params
    state = step(state, X)
    close(state.ema_params, state.params)
    close(state.replace(ema_name="long").ema_params, first)
    with pytest.raises(ema.ArgumentError, match="must be one of"):
        _ = state.replace(ema_name=None).ema_params


def test_the_statistics_of_several_averages_go_by_the_same_name():
    decays = {"short": 0.0, "long": 1.0}
    first = create(decay=decays, batch_stats_tx=params_ema(decays), ema_name="short")
    state = step(first, X)
    close(state.ema_variables, {"params": state.params, "batch_stats": state.batch_stats})
    close(state.replace(ema_name="long").ema_batch_stats, first.batch_stats)


def test_a_model_without_statistics_and_a_subclass():
    class Mine(EMATrainState):
        key: jax.Array = struct.field(default=None)

    model = nn.Dense(2)
    state = Mine.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), X)["params"],
        tx=optax.chain(optax.sgd(0.1), params_ema(0.5)),
        key=jax.random.key(1),
    )
    assert state.ema_variables.keys() == {"params"}
    assert isinstance(state.apply_gradients(grads=state.params), Mine)
    with pytest.raises(ema.ArgumentError, match="`batch_stats` must be given"):
        Mine.create(apply_fn=None, params=state.params, tx=state.tx, batch_stats_tx=params_ema(0.5))


def test_the_scales_of_fp8_stay_beside_the_average():
    """Flax keeps them in the params under a key of their own and hides them from the optimizer."""
    params = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": jnp.ones(1)}}
    tx = optax.chain(optax.sgd(0.5), params_ema(0.5))
    state = EMATrainState.create(apply_fn=None, params=params, tx=tx)
    grads = {"params": {"w": jnp.ones(2)}, "_overwrite_with_gradient": {"scale": 3 * jnp.ones(1)}}
    average = state.apply_gradients(grads=grads).ema_params
    np.testing.assert_array_equal(average["params"]["w"], 0.75)
    np.testing.assert_array_equal(average["_overwrite_with_gradient"]["scale"], 3.0)


def test_it_survives_serialization():
    state = step(create(batch_stats_tx=params_ema(0.25)), X)
    fresh = create(batch_stats_tx=params_ema(0.25))
    restored = serialization.from_bytes(fresh, serialization.to_bytes(state))
    close(restored.ema_variables, state.ema_variables)
    close(step(restored, X).ema_variables, step(state, X).ema_variables)
    close(get_params_ema(restored.opt_state), state.ema_params)
