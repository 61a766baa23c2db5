"""Training with Flax: linen's ``TrainState``, ``nnx.Optimizer``, serialization."""

from __future__ import annotations

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import ema
from ema.jax_backend import get_params_ema, params_ema

X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
Y = X @ jnp.ones((3, 2), jnp.float32)


def chain():
    return optax.chain(optax.sgd(0.1), params_ema(0.5, name="half"))


def test_linen_train_state():
    """Trained under jit; the chain's average is the recursion, and the model runs on it."""
    model = nn.Dense(2)
    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=chain())

    @jax.jit
    def step(state):
        loss = lambda p: jnp.mean((state.apply_fn({"params": p}, X) - Y) ** 2)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    expected = params
    for _ in range(3):
        state = step(state)
        expected = jax.tree.map(lambda a, p: 0.5 * a + 0.5 * p, expected, state.params)
    average = get_params_ema(state.opt_state, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), average, expected)
    assert state.apply_fn({"params": average}, X).shape == (16, 2)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nnx_optimizer(jit, dtype):
    """Trained eagerly and under nnx.jit; ``nnx.update`` takes what ``get_params_ema`` returns."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=dtype)
    optimizer = nnx.Optimizer(model, chain(), wrt=nnx.Param)
    expected = [p.astype(jnp.float32) for p in jax.tree.leaves(nnx.state(model, nnx.Param))]

    def step(model, optimizer):
        x, y = X.astype(dtype), Y.astype(dtype)
        grads = nnx.grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads)

    step = nnx.jit(step) if jit else step
    for _ in range(3):
        step(model, optimizer)
        live = jax.tree.leaves(nnx.state(model, nnx.Param))
        expected = [
            0.5 * a + 0.5 * p.astype(jnp.float32) for a, p in zip(expected, live, strict=True)
        ]
    for params in (None, nnx.state(model, nnx.Param), nnx.as_pure(nnx.state(model, nnx.Param))):
        average = get_params_ema(optimizer.opt_state, params, name="half")
        assert isinstance(average, nnx.State)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(average))
        for a, e in zip(jax.tree.leaves(average), expected, strict=True):
            assert a.dtype == (jnp.float32 if params is None else dtype)
            np.testing.assert_allclose(a.astype(jnp.float32), e.astype(a.dtype), rtol=1e-5)
    nnx.update(model, average)
    np.testing.assert_array_equal(model.kernel[...], average["kernel"])
    assert model.kernel[...].dtype == dtype
    assert get_params_ema(optimizer).keys() == average.keys()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compensated": True, "on_nonfinite": "skip"},
        {"accumulator_dtype": jnp.bfloat16, "on_nonfinite": "skip"},
    ],
    ids=["plain", "precise", "narrow"],
)
def test_state_survives_serialization(options, params):
    """Through flax.serialization and pickle the state is the same and goes on training."""
    params["n"] = jnp.int32(0)
    floats = {"dense": True, "bias": True, "n": False}
    tx = optax.chain(optax.masked(optax.sgd(0.1), floats), params_ema(0.5, name="half", **options))
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zeros, state, params)
    restored = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    for copy in (restored, pickle.loads(pickle.dumps(state))):
        assert jax.tree.structure(copy) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, copy, state)
        assert copy[-1].name == {"half": ()}
        _, onward = jax.jit(tx.update)(zeros, copy, params)
        assert int(onward[-1].count) == 2


def test_a_restored_state_of_another_dtype_is_refused(params):
    """An optimizer state cast to bfloat16 as a whole would stall without a word."""
    tx = params_ema(0.999)
    state = tx.init(params)
    narrow = state._replace(
        params_ema=jax.tree.map(lambda a: a.astype(jnp.bfloat16), state.params_ema)
    )
    with pytest.raises(
        ema.ModelError, match="`bias` is averaged in float32, the state has bfloat16"
    ):
        tx.update(params, narrow, params)
