"""Checkpoints by Orbax, and going on from one under a chain with other averages."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import ema
from ema.jax_backend import get_params_ema, params_ema
from ema.jax_backend.saving.restore import adapt_opt_state


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def params(params):
    return {**params, "layers": [jnp.ones(2), jnp.zeros(3, jnp.bfloat16)], "n": jnp.int32(1)}


@pytest.fixture
def after(params):
    """``after(tx, steps)``: the state after some steps, with momenta that are not zero."""

    def run(tx, steps, state=None):
        state = tx.init(params) if state is None else state
        for k in range(steps):
            grads = jax.tree.map(lambda p, k=k: (p + jnp.ones_like(p)) * (k + 1), params)
            with jax.numpy_dtype_promotion("standard"):
                _, state = jax.jit(tx.update)(grads, state, params)
        return state

    return run


@pytest.fixture
def through(tmp_path):
    """``through(state, target)``: the state saved and restored by Orbax."""

    def run(state, target=None):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state, force=True)
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(tmp_path / "state", target)

    return run


def floats(tx):
    """The transform on the floating-point leaves alone."""
    mask = {"dense": True, "bias": True, "layers": True, "n": False}
    return optax.masked(tx, mask)


ADAM = floats(optax.adam(0.1))
MOMENTUM = floats(optax.chain(optax.trace(0.9), optax.trace(0.5), optax.scale(-0.1)))
WITH = {
    "plain": params_ema(0.5),
    "named": params_ema(0.5, name="a"),
    "several": params_ema({"a": 0.5, "b": ema.HalfLife(steps=3)}),
    "precise": params_ema({"a": 0.5, "b": 0.9}, compensated=True, on_nonfinite="skip"),
    "narrow": params_ema(0.5, accumulator_dtype=jnp.bfloat16, on_nonfinite="skip"),
}


@pytest.mark.parametrize("kind", WITH)
def test_orbax_with_a_target(kind, after, through, params):
    tx = optax.chain(ADAM, WITH[kind])
    state = after(tx, 3)
    restored = through(state, jax.eval_shape(tx.init, params))
    equal(restored, state)
    equal(after(tx, 2, restored), after(tx, 5 - 3, state))


@pytest.mark.parametrize("kind", WITH)
def test_orbax_without_a_target(kind, after, through, params):
    """Tuples come back as lists and NamedTuples as dicts."""
    tx = optax.chain(MOMENTUM, WITH[kind])
    state = after(tx, 3)
    raw = through(state)
    assert type(raw) is list
    equal(adapt_opt_state(raw, tx, params), state)


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("base", [ADAM, MOMENTUM], ids=["adam", "two traces"])
def test_an_average_added_to_an_old_checkpoint(base, target, after, through, params):
    """The optimizer goes on, the average starts at the params."""
    state = after(base, 3)
    restored = through(state, jax.eval_shape(base.init, params) if target else None)
    tx = optax.chain(base, params_ema(0.5))
    adapted = adapt_opt_state(restored, tx, params)
    equal(adapted, (state, params_ema(0.5).init(params)))
    assert int(after(tx, 2, adapted)[-1].count) == 2


def test_an_average_removed(after, params):
    for kind in WITH.values():
        state = after(optax.chain(optax.clip(9.0), MOMENTUM, kind), 3)
        equal(adapt_opt_state(state, optax.chain(optax.clip(9.0), MOMENTUM), params), state[:2])
        equal(adapt_opt_state(state, MOMENTUM, params), state[1])


def test_one_of_two_added_and_removed(after, params):
    one = optax.chain(ADAM, params_ema(0.5, name="a"))
    two = optax.chain(ADAM, params_ema(0.9, name="b"), params_ema(0.5, name="a"))
    state = after(one, 3)
    more = adapt_opt_state(state, two, params)
    equal(more[2], state[1])
    assert int(more[1].count) == 0
    equal(adapt_opt_state(more, one, params), state)


def test_another_schedule_needs_nothing(after, through, params):
    state = after(optax.chain(ADAM, params_ema(0.5)), 3)
    tx = optax.chain(ADAM, params_ema(ema.UniformAverage(), update_every=2))
    restored = through(state, jax.eval_shape(tx.init, params))
    assert int(after(tx, 1, restored)[-1].count) == 4
    equal(adapt_opt_state(restored, tx, params), state)


@pytest.mark.parametrize("target", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_a_remainder_and_the_guard_come_and_go(several, target, after, through, params):
    """What both states have stays; what comes begins at zero; the average is the same."""
    decay = {"a": 0.5, "b": 0.9} if several else 0.5
    plain = optax.chain(ADAM, params_ema(decay))
    precise = optax.chain(ADAM, params_ema(decay, compensated=True, on_nonfinite="skip"))
    state = after(plain, 3)
    restored = through(state, jax.eval_shape(plain.init, params) if target else None)
    more = adapt_opt_state(restored, precise, params)
    equal(more[-1]._replace(remainder=(), skipped=()), state[-1])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(more[-1].remainder))
    assert int(more[-1].skipped) == 0
    onward = after(precise, 2, more)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(onward[-1].remainder))
    skips = onward[-1]._replace(skipped=jnp.int32(3))
    equal(adapt_opt_state((onward[0], skips), precise, params)[-1], skips)
    less = adapt_opt_state(onward, plain, params)
    equal(less[-1], onward[-1]._replace(remainder=(), skipped=()))
    after(plain, 1, less)


def test_groups(after, params):
    """Averages of one name, in several groups, each stay with theirs."""
    labels = {"dense": "a", "bias": "b", "layers": "b", "n": "c"}
    groups = {"a": params_ema(0.5), "b": params_ema(0.9), "c": optax.set_to_zero()}
    tx = optax.partition(groups, labels)
    state = after(tx, 2)
    equal(adapt_opt_state(jax.tree.map(np.asarray, state), tx, params), state)


def test_an_nnx_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    base = optax.sgd(0.1, momentum=0.9)
    old = nnx.Optimizer(model, base, wrt=nnx.Param)
    for _ in range(2):
        old.update(model, nnx.state(model, nnx.Param))
    tx = optax.chain(base, params_ema(0.5))
    new = nnx.Optimizer(model, tx, wrt=nnx.Param)
    live = nnx.as_pure(nnx.state(model, nnx.Param))
    nnx.update(new.opt_state, nnx.state(adapt_opt_state(old.opt_state, tx, live)))
    equal(nnx.as_pure(new.opt_state)[0], nnx.as_pure(old.opt_state))
    equal(get_params_ema(new), live)


def test_what_cannot_be_adapted(after, params):
    state = after(optax.chain(ADAM, params_ema(0.5, name="a")), 1)
    renamed = optax.chain(ADAM, params_ema(0.5, name="b"))
    with pytest.raises(ema.ArgumentError, match=r"\('b'\), or differ .* got 'a'"):
        adapt_opt_state(state, renamed, params)
    twice = optax.chain(ADAM, params_ema(0.5), params_ema(0.5))
    with pytest.raises(ema.ArgumentError, match=r"\(\(unnamed\), \(unnamed\)\).* got \(unnamed\)"):
        adapt_opt_state(after(optax.chain(ADAM, params_ema(0.5)), 1), twice, params)
    with pytest.raises(ema.ModelError, match=r"missing: .*trace.*unexpected: .*nu.dense.kernel"):
        adapt_opt_state(state, MOMENTUM, params)
    with pytest.raises(ema.ModelError, match=r"trace.bias` appears 1 times, in `tx` 2 times"):
        adapt_opt_state(after(floats(optax.trace(0.9)), 1), MOMENTUM, params)
    wider = params | {"bias": jnp.ones(6)}
    with pytest.raises(ema.ModelError, match=r"mu.bias` is float32\[5\], `tx` has float32\[6\]"):
        adapt_opt_state(state, ADAM, wider)
    plain = params_ema(0.5)
    with pytest.raises(ema.ModelError, match=r"`bias` is float32\[5\], `tx` has float32\[6\]"):
        adapt_opt_state(plain.init(params), plain, wider)


class Layers(nnx.Module):
    """More than ten, whose numbers are sorted otherwise once they are strings."""

    def __init__(self):
        self.layers = nnx.List([nnx.Param(jnp.full(2, float(k))) for k in range(12)])


@pytest.fixture
def restored(through):
    """``restored(tx, pure)``: an nnx.Optimizer after two steps, and what Orbax has of its state."""

    def run(tx, pure):
        model = Layers()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(2):
                optimizer.update(model, nnx.state(model, nnx.Param))
        state = nnx.state(optimizer)
        live = nnx.as_pure(nnx.state(model, nnx.Param))
        return optimizer, live, through(nnx.to_pure_dict(state) if pure else state)["opt_state"]

    return run


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("kind", WITH)
def test_orbax_without_a_target_of_an_nnx_optimizer(kind, pure, restored):
    """Arrays have a level called `value`, and the names of averages are lost."""
    tx = optax.chain(optax.adam(0.1), WITH[kind])
    optimizer, live, raw = restored(tx, pure)
    equal(adapt_opt_state(raw, tx, live), nnx.as_pure(optimizer.opt_state))
    without = adapt_opt_state(raw, optax.adam(0.1), live)
    equal(without, nnx.as_pure(optimizer.opt_state)[0])


@pytest.mark.parametrize("pure", [False, True])
def test_an_average_added_to_an_nnx_optimizer_that_orbax_restored(pure, restored):
    optimizer, live, raw = restored(optax.adam(0.1), pure)
    tx = optax.chain(optax.adam(0.1), params_ema(0.5, name="a"))
    state, average = adapt_opt_state(raw, tx, live)
    equal(state, nnx.as_pure(optimizer.opt_state))
    equal(average, params_ema(0.5, name="a").init(live))


@pytest.mark.parametrize("pure", [False, True])
def test_groups_of_an_nnx_optimizer_that_orbax_restored(pure, restored):
    """A dozen, each with the average that it had."""

    def groups(params):
        """The number of the layer, for each leaf."""
        structure = jax.tree.structure(params)
        return structure.unflatten(map(str, range(structure.num_leaves)))

    def alone(number):
        return lambda params: jax.tree.map(lambda group: group == number, groups(params))

    numbers = list(map(str, range(12)))
    for tx in (
        optax.partition({number: params_ema(0.5) for number in numbers}, groups),
        optax.chain(*(optax.masked(params_ema(0.5), alone(number)) for number in numbers)),
    ):
        optimizer, live, raw = restored(tx, pure)
        equal(adapt_opt_state(raw, tx, live), nnx.as_pure(optimizer.opt_state))
