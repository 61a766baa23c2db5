"""``get_params_ema``: finding, choosing, merging, casting, refusing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema
from ema.jax_backend import get_params_ema, params_ema


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.chain(optax.sgd(0.1), tx), optax.identity()),
        lambda tx: optax.named_chain(("opt", optax.sgd(0.1)), ("ema", tx)),
        lambda tx: optax.masked(tx, {"dense": True, "bias": True}),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.partition({0: tx}, {"dense": 0, "bias": 0}),
        lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(optax.scale(rate), tx))(0.1),
    ],
)
def test_found_wherever_it_is(wrap, params):
    found = get_params_ema(wrap(params_ema(0.9)).init(params))
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_with_params_it_has_their_dtypes_and_their_other_leaves():
    params = {"w": jnp.full(2, 1.5, jnp.bfloat16), "n": jnp.int32(7), "none": None}
    state = params_ema(0.9).init(params)
    params["n"] = jnp.int32(8)
    average = jax.jit(get_params_ema)(state, params)
    assert average["w"].dtype == jnp.bfloat16
    assert int(average["n"]) == 8
    assert average["none"] is None


def test_none_and_several_are_told_apart(params):
    with pytest.raises(ema.ArgumentError, match=r"must contain the state of params_ema.*tuple"):
        get_params_ema(optax.sgd(0.1).init(params))
    named = optax.chain(params_ema(0.9, name="short"), params_ema(0.9, name="long")).init(params)
    with pytest.raises(ema.ArgumentError, match=r"`name` must be one of `short`, `long`, got None"):
        get_params_ema(named)
    with pytest.raises(ema.ArgumentError, match=r"must be one of `short`, `long`, got 'lnog'"):
        get_params_ema(named, name="lnog")
    half = optax.chain(params_ema(0.9), params_ema(0.9, name="long")).init(params)
    with pytest.raises(ema.ArgumentError, match="one of 2 averages, but one of them has no name"):
        get_params_ema(half)
    same = optax.chain(params_ema(0.9), params_ema(0.99)).init(params)
    with pytest.raises(
        ema.ArgumentError, match=r"join 2 averages with the same name.*keep them apart"
    ):
        get_params_ema(same)
    with pytest.raises(
        ema.ArgumentError, match=r"2 averages with the same name hold `bias`, `dense.kernel`"
    ):
        get_params_ema(same, params)


def test_params_of_another_model_are_refused(params):
    state = params_ema(0.9).init(params)
    other = {"dense": {"kernel": jnp.ones((4, 3))}, "scale": jnp.ones(1)}
    with pytest.raises(
        ema.ModelError,
        match=r"missing: `bias`; unexpected: `scale`; `dense.kernel` has shape \(4, 3\)",
    ):
        get_params_ema(state, other)
