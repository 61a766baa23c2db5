"""Averages with a remainder: no dead zone, the bits of the formula, ends that copy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema
from ema.jax_backend import get_params_ema, params_ema
from ema.jax_backend.update.equation import lerp_compensated
from tests.jax_helpers import train


def fused(a, c, p, w):
    """The formula with one fused multiply-add, emulated in longer arithmetic."""
    d = (p - a) - c
    y = (c.astype(np.longdouble) + np.longdouble(w) * d.astype(np.longdouble)).astype(np.float32)
    t = a + y
    return t, y - (t - a)


@pytest.mark.parametrize("weight", [1e-5, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-5])
def test_it_is_the_formula_to_the_last_bit(weight):
    """No step is reassociated: XLA could take ``(a + y) − a`` for ``y``."""
    rng = np.random.default_rng(0)
    w = np.float32(weight)
    a, p = (rng.normal(size=4000).astype(np.float32) for _ in range(2))
    c = (rng.normal(size=4000) * 1e-8).astype(np.float32)
    moved, lost = lerp_compensated(a, c, p, jnp.asarray(w))
    expected, remainder = fused(a, c, p, w)
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(lost, remainder)
    assert np.count_nonzero(remainder) > 500


def test_the_ends_are_copies():
    """At weight 1 the params and no remainder; at weight 0 nothing changes."""
    a = jnp.array([jnp.inf, 1.0, -0.0], jnp.float32)
    c = jnp.array([0.0, 1e-9, 2e-9], jnp.float32)
    p = jnp.array([jnp.inf, jnp.nan, 3.0], jnp.float32)
    moved, lost = lerp_compensated(a, c, p, jnp.float32(1))
    np.testing.assert_array_equal(moved, p)
    np.testing.assert_array_equal(lost, jnp.zeros(3))
    moved, lost = lerp_compensated(a, c, p, jnp.float32(0))
    np.testing.assert_array_equal(moved, a)
    np.testing.assert_array_equal(lost, c)
    assert np.signbit(moved[2])


def test_complex_is_two_reals():
    rng = np.random.default_rng(1)
    a, c, p = ((rng.normal(size=8) + 1j * rng.normal(size=8)).astype(np.complex64) for _ in "acp")
    w = jnp.float32(0.125)
    for ours, real, imag in zip(
        lerp_compensated(a, c, p, w),
        lerp_compensated(a.real.copy(), c.real.copy(), p.real.copy(), w),
        lerp_compensated(a.imag.copy(), c.imag.copy(), p.imag.copy(), w),
        strict=True,
    ):
        assert ours.dtype == jnp.complex64
        np.testing.assert_array_equal(jnp.real(ours), real)
        np.testing.assert_array_equal(jnp.imag(ours), imag)


def test_accuracy_against_float64():
    """20 000 noisy updates at decay 0.99999: at most 2e-7, where the plain form is 1e-5 off."""
    rng = np.random.default_rng(3)
    weights = rng.normal(size=64).astype(np.float32)
    targets = weights + rng.normal(size=(20_000, 64)).astype(np.float32)

    def average(tx):
        def step(state, target):
            _, state = tx.update(target, state, jnp.zeros_like(target))
            return state, None

        state, _ = jax.jit(lambda s, t: jax.lax.scan(step, s, t))(tx.init(weights), targets)
        return np.asarray(state.params_ema, np.float64)

    w = float(ema.ConstantDecay(decay=0.99999).weight(1.0))
    reference = weights.astype(np.float64)
    for row in targets.astype(np.float64):
        reference += w * (row - reference)

    def error(a):
        return np.max(np.abs(a - reference)) / np.max(np.abs(reference))

    assert error(average(params_ema(0.99999, compensated=True))) <= 2e-7
    assert error(average(params_ema(0.99999))) > 1e-6


@pytest.mark.parametrize("options", [{}, {"update_every": 2}])
def test_the_state_holds_a_remainder_of_each_average(options, params):
    """Of its shapes and dtypes; zero as long as the average is a copy."""
    params = {**params, "n": jnp.int32(3), "half": jnp.ones(3, jnp.bfloat16)}
    tx = params_ema({"a": 0.9, "b": 0.99}, compensated=True, update_after_step=3, **options)
    chain = optax.chain(optax.masked(optax.sgd(0.1), jax.tree.map(_floats, params)), tx)
    for steps in (0, 3, 6):
        state, history = train(chain, params, steps)
        state = state[-1]
        assert jax.tree.structure(state.remainder) == jax.tree.structure(state.params_ema)
        assert jax.eval_shape(lambda t: t, state.remainder) == jax.eval_shape(
            lambda t: t, state.params_ema
        )
        zero = [not np.any(c) for c in jax.tree.leaves(state.remainder)]
        assert all(zero) if steps <= 3 else not any(zero)
    live = history[-1]
    assert get_params_ema((None, state), live, "a")["half"].dtype == jnp.bfloat16


def _floats(leaf):
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def test_float64_averages_have_a_float64_remainder():
    with jax.enable_x64(True):
        tree = {"w": jnp.full(2, 1 / 3, jnp.float32), "z": jnp.ones(2, jnp.complex64)}
        tx = params_ema(1 - 1e-9, accumulator_dtype=jnp.float64, compensated=True)
        _, state = jax.jit(tx.update)(tree, tx.init(tree), tree)
        dtypes = {k: str(v.dtype) for k, v in state.remainder.items()}
        assert dtypes == {"w": "float64", "z": "complex128"}
        assert np.all(np.abs(state.remainder["w"]) < 1e-16)
        assert np.any(state.remainder["w"] != 0)


def test_gradients_flow_through_the_update(params):
    tx = params_ema(0.75, compensated=True)
    state = tx.init(params)

    def loss(updates):
        _, after = tx.update(updates, state, params)
        return jnp.sum(after.params_ema["bias"])

    grads = jax.grad(loss)(jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(grads["bias"], 0.25)


def test_a_state_of_other_options_is_refused(params):
    plain, compensated = params_ema(0.9), params_ema(0.9, compensated=True)
    with pytest.raises(
        ema.ArgumentError, match="must hold `remainder`, because `compensated` is True"
    ):
        compensated.update(params, plain.init(params), params)
    with pytest.raises(ema.ArgumentError, match=r"must not hold `remainder`.*adapt_opt_state"):
        plain.update(params, compensated.init(params), params)
    state = compensated.init(params)
    wrong = state._replace(remainder={**state.remainder, "bias": jnp.zeros(4)})
    with pytest.raises(ema.ModelError, match=r"`bias` has a remainder of float32\[4\]"):
        compensated.update(params, wrong, params)
    lost = {"dense": state.remainder["dense"]}
    with pytest.raises(ema.ModelError, match="missing: `bias`"):
        compensated.update(params, state._replace(remainder=lost), params)
