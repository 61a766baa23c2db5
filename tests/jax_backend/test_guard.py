"""``on_nonfinite``: an update whose params hold NaN or Inf."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema
from ema.jax_backend import params_ema
from ema.jax_backend.update.guard import all_finite

OPTIONS = {
    "plain": {},
    "compensated": {"compensated": True},
    "narrow": {"accumulator_dtype": jnp.bfloat16},
    "several": {"decay": {"a": 0.9, "b": ema.UniformAverage()}},
}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def params(params):
    return {**params, "half": jnp.ones(3, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}


@pytest.mark.parametrize("where", ["bias", "half", "z"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("kind", OPTIONS)
def test_skipped_nothing_changes_but_the_step(kind, every, value, where, params):
    """In jitted steps that donate their state; afterwards the average goes on as if nothing was."""
    options = {"decay": 0.9, **OPTIONS[kind]}
    tx = params_ema(**options, update_every=every, on_nonfinite="skip")
    zeros = jax.tree.map(jnp.zeros_like, params)
    step = jax.jit(lambda state, live: tx.update(zeros, state, live)[1], donate_argnums=0)
    bad = {**params, where: params[where].at[-1].set(value)}
    good = jax.tree.map(lambda p: p * jnp.asarray(1.5, p.dtype), params)

    def run(lives):
        state = tx.init(params)
        for live in lives:
            state = step(state, live)
        return state

    expected = run([good] * (2 * every))
    state = run([good] * every + [bad] * every + [good] * every)
    assert int(state.step) == 3 * every
    assert (int(state.count), int(state.skipped)) == (2, 1)
    equal(state._replace(step=0, skipped=0), expected._replace(step=0, skipped=0))


def test_steps_that_are_not_due_are_not_looked_at(params):
    """Nor are the copies through ``update_after_step``: the average is the live weights there."""
    bad = {**params, "bias": params["bias"].at[0].set(jnp.nan)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = params_ema(0.9, update_every=2, update_after_step=1, on_nonfinite="skip")
    state = tx.init(params)
    for live, skipped, nan in ((bad, 0, True), (bad, 0, True), (params, 0, True), (bad, 0, True)):
        _, state = jax.jit(tx.update)(zeros, state, live)
        assert int(state.skipped) == skipped
        assert bool(jnp.isnan(state.params_ema["bias"][0])) == nan
    _, state = jax.jit(tx.update)(zeros, state, bad)  # step 5 is due
    assert (int(state.count), int(state.skipped)) == (1, 1)


def test_leaves_that_are_not_averaged_do_not_matter(params):
    mask = jax.tree.map(lambda _: True, params) | {"bias": False}
    tx = optax.masked(params_ema(0.9, on_nonfinite="skip"), mask)
    bad = {**params, "bias": jnp.full(5, jnp.nan)}
    _, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), bad)
    assert (int(state.inner_state.count), int(state.inner_state.skipped)) == (1, 0)


def test_a_sum_that_overflows_is_finite():
    largest = jnp.full((4, 8), np.finfo(np.float32).max)
    assert bool(all_finite([largest, -largest], [True, True]))
    assert bool(all_finite([], []))
    assert not bool(all_finite([largest, largest.at[3, 7].set(-jnp.inf)], [True, True]))
    assert not bool(all_finite([largest.at[0, 1].set(jnp.nan), largest], [True, True]))
    opposite = largest.at[0, 0].set(jnp.inf).at[1, 1].set(-jnp.inf)
    assert not bool(all_finite([opposite], [True]))


def test_an_ensemble_decides_member_by_member():
    tx = params_ema(0.5, on_nonfinite="skip")
    live = jnp.ones((3, 4)).at[1, 2].set(jnp.nan)
    step = jax.jit(jax.vmap(lambda live: tx.update(jnp.zeros(4), tx.init(jnp.zeros(4)), live)[1]))
    state = step(live)
    assert state.skipped.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(state.params_ema[:, 0], [0.5, 0.0, 0.5])


def test_gradients_flow_past_the_guard(params):
    tx = params_ema(0.75, on_nonfinite="skip")
    state = tx.init(params)

    def loss(updates):
        _, after = tx.update(updates, state, params)
        return jnp.sum(after.params_ema["bias"])

    grads = jax.grad(loss)(jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(grads["bias"], 0.25)


@pytest.mark.parametrize("every", [1, 10])
def test_the_guard_needs_no_temporary(every):
    """4 bytes a parameter to sum them; XLA's account adds the 8 of the branch that looks again."""
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1 << 18,), (512, 512))]

    def compiled(**options):
        tx = optax.chain(optax.sgd(0.1), params_ema(0.9, update_every=every, **options))

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
        moved = program.cost_analysis()["bytes accessed"] / (1 << 19)
        return moved, program.memory_analysis().temp_size_in_bytes / (1 << 19)

    plain, guarded = compiled(), compiled(on_nonfinite="skip")
    assert guarded[0] - plain[0] < 12.1
    assert guarded[1] - plain[1] < 0.1


def test_raise_in_eager_calls_names_the_params(params):
    """The state given stays as it is; what is not due is not looked at."""
    tx = params_ema(0.9, update_every=2, on_nonfinite="raise")
    bad = {**params, "half": params["half"].at[0].set(jnp.inf), "bias": jnp.full(5, jnp.nan)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zeros, tx.init(params), bad)
    with pytest.raises(
        ema.StateError, match="hold NaN or Inf, nothing was averaged: `bias`, `half`"
    ):
        tx.update(zeros, state, bad)
    _, state = tx.update(zeros, state, params)
    assert int(state.count) == 1
    assert state.skipped == ()


@pytest.mark.parametrize("trace", ["jit", "scan", "cond"])
def test_raise_is_refused_where_nothing_can_be_raised(trace, params):
    tx = params_ema(0.9, on_nonfinite="raise")
    state = jax.jit(tx.init)(params)
    update = {
        "jit": jax.jit(lambda s: tx.update(params, s, params)[1]),
        "scan": lambda s: jax.lax.scan(
            lambda s, _: (tx.update(params, s, params)[1], 0), s, length=1
        ),
        "cond": lambda s: jax.lax.cond(
            jnp.array(True), lambda s: tx.update(params, s, params)[1], lambda s: s, s
        ),
    }[trace]
    with pytest.raises(ema.ArgumentError, match=r"must not be 'raise' where .*'skip'.*`skipped`"):
        update(state)


def test_a_state_without_the_number_is_refused(params):
    skip, plain = params_ema(0.9, on_nonfinite="skip"), params_ema(0.9)
    with pytest.raises(
        ema.ArgumentError, match="must hold `skipped`, because `on_nonfinite` is 'skip'"
    ):
        skip.update(params, plain.init(params), params)
    with pytest.raises(ema.ArgumentError, match="must not hold `skipped`"):
        plain.update(params, skip.init(params), params)
