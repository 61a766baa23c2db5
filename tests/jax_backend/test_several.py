"""Several averages in one transform: the bits of separate ones, read and chosen by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema
from ema.jax_backend import get_params_ema, params_ema
from tests.jax_helpers import grads, train

DECAYS = {
    "short": 0.9,
    "long": ema.HalfLife(steps=100),
    "mean": ema.UniformAverage(),
    "warm": ema.DebiasedDecay(decay=0.99),
}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_every": 3, "update_after_step": 2},
        {"compensated": True, "on_nonfinite": "skip"},
        {"accumulator_dtype": jnp.bfloat16, "update_every": 3},
    ],
)
def test_each_has_the_bits_of_an_average_of_its_own(options, params):
    params = {**params, "half": jnp.linspace(-1, 1, 64).astype(jnp.bfloat16)}
    several = optax.chain(optax.sgd(0.1), params_ema(DECAYS, **options))
    state, history = train(several, params, 20)
    for name, decay in DECAYS.items():
        alone, _ = train(optax.chain(optax.sgd(0.1), params_ema(decay, **options)), params, 20)
        equal(get_params_ema(state, name=name), alone[-1].params_ema)
        assert get_params_ema(state, history[-1], name)["half"].dtype == jnp.bfloat16
    assert int(state[-1].count) == int(alone[-1].count)


def test_the_names_are_static_and_the_order_of_the_mapping_is_no_matter(params):
    one = params_ema({"a": 0.9, "b": 0.5}).init(params)
    other = params_ema({"b": 0.5, "a": 0.9}).init(params)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert one.name == {"a": (), "b": ()}
    assert not jax.tree.leaves(one.name)
    assert jax.tree.structure(jax.jit(lambda s: s)(one)) == jax.tree.structure(one)


def test_a_mapping_of_one_name_is_the_name(params):
    mapping, plain = params_ema({"a": 0.9}), params_ema(0.9, name="a")
    assert jax.tree.structure(mapping.init(params)) == jax.tree.structure(plain.init(params))


@pytest.mark.parametrize("jit", [False, True])
def test_no_two_averages_share_memory(jit, params):
    """A donated step would be refused, or change both."""
    tx = optax.chain(optax.sgd(0.1), params_ema({"a": 0.9, "b": 0.5}))
    state = (jax.jit(tx.init) if jit else tx.init)(params)

    def update(params, state):
        updates, state = tx.update(grads(params, 0), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(update, donate_argnums=(0, 1))
    for _ in range(2):
        params, state = step(params, state)
    assert float(state[-1].params_ema["a"]["bias"][0]) != float(
        state[-1].params_ema["b"]["bias"][0]
    )


def test_the_new_params_are_widened_once(params):
    """Two averages of bfloat16 parameters share one ``reduce_precision`` a leaf."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    tx = params_ema({"a": 0.9, "b": 0.5, "c": 0.1})
    text = str(jax.make_jaxpr(tx.update)(half, tx.init(half), half))
    assert text.count("= reduce_precision[") == len(jax.tree.leaves(half))


def test_one_must_be_chosen(params):
    state = params_ema({"short": 0.9, "long": 0.99}).init(params)
    with pytest.raises(ema.ArgumentError, match="must be one of `long`, `short`, got None"):
        get_params_ema(state)
    with pytest.raises(ema.ArgumentError, match="must be one of `long`, `short`, got 'lnog'"):
        get_params_ema(state, name="lnog")


def test_in_groups_each_name_is_merged(params):
    both = {"a": 0.9, "b": 0.5}
    groups = {0: optax.chain(optax.sgd(0.1), params_ema(both)), 1: params_ema(both)}
    tx = optax.partition(groups, {"dense": 0, "bias": 1})
    state, history = train(tx, params, 3)
    merged = get_params_ema(state, history[-1], name="b")
    alone, _ = train(optax.chain(optax.sgd(0.1), params_ema(0.5)), params, 3)
    equal(merged["dense"], alone[-1].params_ema["dense"])


def test_map_params_reaches_every_average(params):
    tx = params_ema({"a": 0.9, "b": 0.5})
    specs = {"dense": {"kernel": "spec of kernel"}, "bias": "spec of bias"}
    mapped = optax.tree.map_params(tx, lambda _, spec: spec, tx.init(params), specs)
    assert mapped.params_ema == {"a": specs, "b": specs}


def test_the_state_of_other_names_is_refused(params):
    state = params_ema({"a": 0.9, "b": 0.5}).init(params)
    with pytest.raises(ema.ArgumentError, match=r"must hold the averages 'a', 'c', got 'a', 'b'"):
        params_ema({"a": 0.9, "c": 0.5}).update(params, state, params)
    with pytest.raises(ema.ArgumentError, match=r"must hold the averages \(unnamed\), got 'a'"):
        params_ema(0.9).update(params, params_ema(0.9, name="a").init(params), params)
