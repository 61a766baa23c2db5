"""``params_ema`` inside optax's own wrappers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema
from ema.jax_backend import get_params_ema, params_ema
from tests.jax_helpers import grads, relative_error, train


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_masked_averages_the_chosen_leaves_alone(params):
    mask = {"dense": {"kernel": True}, "bias": False}
    tx = optax.chain(optax.sgd(0.1), optax.masked(params_ema(0.9), mask))
    state, history = train(tx, params, 5)
    plain, _ = train(optax.chain(optax.sgd(0.1), params_ema(0.9)), params, 5)
    average = state[-1].inner_state.params_ema
    assert average["bias"] == optax.MaskedNode()
    equal(average["dense"], plain[-1].params_ema["dense"])
    filled = get_params_ema(state, history[-1])
    equal(filled, {"dense": average["dense"], "bias": history[-1]["bias"]})
    with pytest.raises(ema.ArgumentError, match=r"`params` must be given to fill .*`bias`"):
        get_params_ema(state)


def test_a_mask_for_a_whole_subtree(params):
    tx = optax.masked(params_ema(0.9), {"dense": False, "bias": True})
    filled = get_params_ema(tx.init(params), params)
    equal(filled, params)


def test_partition_with_an_average_per_group(params):
    """Averages of one name with disjoint masks are one average."""
    labels = {"dense": {"kernel": "a"}, "bias": "b"}
    groups = {
        "a": optax.chain(optax.sgd(0.1), params_ema(0.9)),
        "b": optax.chain(optax.sgd(0.1), params_ema(0.5)),
        "empty": optax.chain(optax.sgd(0.1), params_ema(0.9)),
    }
    state, history = train(optax.partition(groups, labels), params, 5)
    merged = get_params_ema(state, history[-1])
    for key, decay in (("dense", 0.9), ("bias", 0.5)):
        alone, _ = train(optax.chain(optax.sgd(0.1), params_ema(decay)), params, 5)
        equal(merged[key], alone[-1].params_ema[key])
    with pytest.raises(ema.ArgumentError, match="join 3 averages with the same name"):
        get_params_ema(state)


def test_inside_multi_steps_real_steps_are_counted(params):
    inner = optax.chain(optax.sgd(0.1), params_ema(0.9))
    tx = optax.MultiSteps(inner, every_k_schedule=3).gradient_transformation()
    with jax.numpy_dtype_promotion("standard"):  # optax's MultiSteps mixes dtypes itself
        step = jax.jit(tx.update)
        state, live, history = tx.init(params), params, []
        for k in range(6):
            updates, state = step(grads(params, k), state, live)
            live = optax.apply_updates(live, updates)
            history.append(live)
    found = state.inner_opt_state[-1]
    assert (int(found.step), int(found.count)) == (2, 2)
    expected = jax.tree.map(
        lambda a, b, c: 0.9 * (0.9 * a + 0.1 * b) + 0.1 * c, params, history[2], history[5]
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        get_params_ema(state, live),
        expected,
    )


def test_inside_apply_if_finite_rejected_steps_are_not_counted(params):
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.1), params_ema(0.9)), 5)
    step = jax.jit(tx.update)
    state = tx.init(params)
    _, state = step(grads(params, 0), state, params)
    before = get_params_ema(state)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), grads(params, 1))
    _, state = step(bad, state, params)
    assert int(state.inner_state[-1].count) == int(state.inner_state[-1].step) == 1
    equal(get_params_ema(state), before)


def test_inject_hyperparams_without_static_args(params):
    """Decay and step numbers arrive traced; the result is that of the plain transform."""
    options = {"update_after_step": 2, "update_every": 3}
    injected = optax.inject_hyperparams(params_ema)(decay=0.9, name="a", **options)
    state, _ = train(optax.chain(optax.sgd(0.1), injected), params, 12)
    plain, _ = train(optax.chain(optax.sgd(0.1), params_ema(0.9, **options)), params, 12)
    assert int(state[-1].inner_state.count) == int(plain[-1].count) == 3
    error = relative_error(get_params_ema(state, name="a"), plain[-1].params_ema)
    assert error < 1e-7  # 0.9 is rounded to float32 on the way


def test_inject_hyperparams_takes_schedules_and_a_decay_set_by_hand(params):
    """Ours are not callable, so optax leaves them alone; optax's own still work."""
    ours = optax.inject_hyperparams(params_ema)(decay=ema.HalfLife(steps=1))
    _, state = jax.jit(ours.update)(params, ours.init(params), params)
    np.testing.assert_allclose(
        state.inner_state.params_ema["bias"], 1.5 * params["bias"], rtol=1e-6
    )
    theirs = optax.inject_hyperparams(params_ema)(decay=optax.constant_schedule(0.5))
    with jax.numpy_dtype_promotion("standard"):
        _, state = jax.jit(theirs.update)(params, theirs.init(params), params)
    np.testing.assert_allclose(
        state.inner_state.params_ema["bias"], 1.5 * params["bias"], rtol=1e-6
    )


def test_inject_hyperparams_on_bfloat16_params_is_refused():
    """There 0.9999 is 1.0, and the average would never move."""
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = optax.inject_hyperparams(params_ema)(decay=0.9999)
    with pytest.raises(ema.ArgumentError, match=r"0\.9999 is 1\.0.*hyperparam_dtype=jnp\.float32"):
        tx.init(params)
    with pytest.raises(ema.ArgumentError, match="at least float32"):
        jax.jit(tx.init)(params)
    tx = optax.inject_hyperparams(params_ema, hyperparam_dtype=jnp.float32)(decay=0.9999)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(state.inner_state.params_ema["w"] - 1.0, 1e-4, rtol=1e-3)


def test_inject_hyperparams_with_a_dtype_says_what_to_do(params):
    tx = optax.inject_hyperparams(params_ema)(decay=0.9, accumulator_dtype=jnp.float32)
    with pytest.raises(ema.ArgumentTypeError, match='static_args="accumulator_dtype"'):
        tx.init(params)


def test_two_averages_in_one_chain(params):
    tx = optax.chain(optax.sgd(0.1), params_ema(0.5, name="short"), params_ema(0.9, name="long"))
    state, history = train(tx, params, 4)
    for name, decay in (("short", 0.5), ("long", 0.9)):
        alone, _ = train(optax.chain(optax.sgd(0.1), params_ema(decay)), params, 4)
        equal(get_params_ema(state, history[-1], name=name), alone[-1].params_ema)


def test_map_params_reaches_every_leaf_of_the_average(params):
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), params_ema(0.9, name="a"))
    specs = {"dense": {"kernel": "spec of kernel"}, "bias": "spec of bias"}
    mapped = optax.tree.map_params(
        tx, lambda _, spec: spec, tx.init(params), specs, transform_non_params=lambda _: "number"
    )
    assert mapped[-1].params_ema == specs
    assert mapped[-1].step == mapped[-1].count == "number"
    assert mapped[-1].name == {"a": ()}
    assert mapped[-1].remainder == mapped[-1].skipped == ()


def test_map_params_reaches_every_remainder(params):
    tx = params_ema({"a": 0.9, "b": 0.5}, compensated=True, on_nonfinite="skip")
    specs = {"dense": {"kernel": "spec of kernel"}, "bias": "spec of bias"}
    mapped = optax.tree.map_params(
        tx, lambda _, spec: spec, tx.init(params), specs, transform_non_params=lambda _: "number"
    )
    assert mapped.params_ema == mapped.remainder == {"a": specs, "b": specs}
    assert mapped.skipped == "number"


@pytest.mark.parametrize(
    "options", [{"compensated": True}, {"accumulator_dtype": jnp.bfloat16}], ids=["rest", "narrow"]
)
def test_masks_and_groups_keep_the_bits(options, params):
    """A leaf is rounded by its name, which a mask leaves as it is."""
    average = params_ema(0.9, on_nonfinite="skip", **options)
    plain, history = train(optax.chain(optax.sgd(0.1), average), params, 5)
    masked = optax.masked(average, {"dense": {"kernel": True}, "bias": False})
    state, _ = train(optax.chain(optax.sgd(0.1), masked), params, 5)
    for field in ("params_ema", "remainder"):
        if getattr(plain[-1], field):
            ours = getattr(state[-1].inner_state, field)
            equal(ours["dense"], getattr(plain[-1], field)["dense"])
            assert ours["bias"] == optax.MaskedNode()
    groups = {0: optax.chain(optax.sgd(0.1), average), 1: optax.chain(optax.sgd(0.1), average)}
    state, _ = train(optax.partition(groups, {"dense": 0, "bias": 1}), params, 5)
    equal(get_params_ema(state, history[-1]), get_params_ema(plain, history[-1]))


def test_inject_hyperparams_needs_a_static_seed_where_it_is_used(params):
    inject = optax.inject_hyperparams(params_ema, static_args="accumulator_dtype")
    tx = inject(0.9, accumulator_dtype=jnp.bfloat16)
    with pytest.raises(ema.ArgumentTypeError, match=r'static_args=\("accumulator_dtype", "seed"\)'):
        jax.jit(tx.update)(params, tx.init(params), params)
