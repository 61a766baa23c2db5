"""``params_ema`` by itself: what it averages, when, and how it behaves under JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema
from ema.jax_backend import params_ema
from tests.jax_helpers import grads, oracle, relative_error, train

LN2 = np.log(2.0)
# decay(n, t) as in the table of the docs, for span 3: written again, in another form.
DECAYS = [
    (0.9, lambda n, t: 0.9),
    (ema.ConstantDecay(decay=0.7), lambda n, t: 0.7),
    (ema.HalfLife(steps=10), lambda n, t: 2 ** (-3 / 10)),
    (ema.HalfLifeRampup(steps=10, rampup_ratio=0.2), lambda n, t: 2 ** (-3 / min(10, 0.2 * t))),
    (ema.InverseGammaWarmup(decay=0.8), lambda n, t: min(0.8, 1 - (1 + n) ** (-2 / 3))),
    (ema.RampWarmup(decay=0.5), lambda n, t: min(0.5, (1 + n) / (10 + n))),
    (ema.ExponentialRamp(decay=0.9, tau=4), lambda n, t: 0.9 - 0.9 * np.exp(-n / 4)),
    (ema.DebiasedDecay(decay=0.9), lambda n, t: 1 - (1 - 0.9) / (1 - 0.9**n)),
    (ema.PowerFunction(gamma=3), lambda n, t: (1 - 3 / t) ** 4),
    (
        ema.CosineDecay(start=0.5, end=1, total_steps=40),
        lambda n, t: 1 - 0.5 * (np.cos(np.pi * min((t - 3) / 40, 1)) + 1) / 2,
    ),
    (ema.UniformAverage(), lambda n, t: 1 - 1 / n),
]


@pytest.mark.parametrize(("schedule", "decay"), DECAYS, ids=lambda x: type(x).__name__)
def test_every_schedule_follows_its_recursion(schedule, decay, params):
    tx = optax.chain(optax.sgd(0.1), params_ema(schedule, update_every=3, update_after_step=2))
    state, history = train(tx, params, 40)
    reference = oracle(params, history, decay, update_every=3, update_after_step=2)
    assert relative_error(state[-1].params_ema, reference) < 3e-7
    assert (int(state[-1].step), int(state[-1].count)) == (40, 12)


@pytest.mark.parametrize("update_every", [1, 3])
def test_through_update_after_step_the_average_is_the_live_params(update_every, params):
    tx = optax.chain(
        optax.sgd(0.1), params_ema(0.5, update_after_step=4, update_every=update_every)
    )
    state, live = tx.init(params), params
    for step in range(1, 10):
        updates, state = tx.update(grads(live, step), state, live)
        live = optax.apply_updates(live, updates)
        average = state[-1].params_ema
        if step <= 4:
            jax.tree.map(np.testing.assert_array_equal, average, live)
            at_start = live
        elif step < 4 + update_every:
            jax.tree.map(np.testing.assert_array_equal, average, at_start)
        assert int(state[-1].count) == max(0, step - 4) // update_every


def test_accuracy_against_float64():
    """10 000 updates at decay 0.9999, noise of the size of the weights: at most 1e-5."""
    rng = np.random.default_rng(3)
    weights = rng.normal(size=64).astype(np.float32)
    noise = rng.normal(size=(10_000, 64)).astype(np.float32)
    tx = params_ema(0.9999)

    def step(state, target):
        params = jnp.zeros_like(target)
        _, state = tx.update(target, state, params)  # params + updates is the target
        return state, None

    state, _ = jax.jit(lambda s, n: jax.lax.scan(step, s, weights + n))(tx.init(weights), noise)
    reference = weights.astype(np.float64)
    for row in noise:
        reference += 1e-4 * ((weights + row).astype(np.float64) - reference)
    assert relative_error(state.params_ema, reference) < 1e-5


def test_donation_after_an_eager_init(params):
    """The average aliases no parameter, so a step may donate both."""
    params["half"] = jnp.ones(3, jnp.bfloat16)
    tx = optax.chain(optax.sgd(0.1), params_ema(0.9))
    state = tx.init(params)

    def update(params, state, k):
        updates, state = tx.update(grads(params, k), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(update, donate_argnums=(0, 1))
    before = params
    for k in range(3):
        params, state = step(params, state, k)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert int(state[-1].count) == 3


def test_scan_gives_the_bits_of_single_steps_and_nothing_is_traced_again(params):
    tx = optax.chain(optax.sgd(0.1), params_ema(ema.RampWarmup(decay=0.99), update_every=2))
    traces = []

    def step(carry, k):
        traces.append(k)
        live, state = carry
        updates, state = tx.update(grads(live, k), state, live)
        return (optax.apply_updates(live, updates), state), None

    carry = start = (params, tx.init(params))
    jitted = jax.jit(step)
    for k in range(7):
        carry, _ = jitted(carry, jnp.int32(k))
    assert len(traces) == 1
    assert jax.tree.map(lambda x: x.dtype, carry) == jax.tree.map(lambda x: x.dtype, start)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(carry))
    scanned, _ = jax.lax.scan(step, start, jnp.arange(7, dtype=jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, scanned, carry)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_narrow_params_are_averaged_in_float32_as_they_are_stored(dtype):
    """Rounded to their dtype first, and small values (subnormal in float16) not flushed."""
    values = np.geomspace(1e-7, 1.0, 64).astype(np.float32)
    params = jnp.asarray(values).astype(dtype)
    tx = optax.chain(optax.scale(0.0), params_ema(0.9))
    _, state = jax.jit(tx.update)(jnp.zeros_like(params), tx.init(params), params)
    average = state[-1].params_ema
    assert average.dtype == jnp.float32
    np.testing.assert_array_equal(average, params.astype(jnp.float32))

    @jax.jit
    def step(params, state, k):
        updates, state = tx.update(grads(params, k), state, params)
        return optax.apply_updates(params, updates), state

    tx = optax.chain(optax.sgd(0.01), params_ema(0.9))
    state, history, start = tx.init(params), [], params
    for k in range(20):
        params, state = step(params, state, k)
        history.append(params)
    reference = oracle(start.astype(jnp.float32), history, lambda n, t: 0.9)
    assert relative_error(state[-1].params_ema, reference) < 3e-7


def test_leaves_that_are_no_numbers_to_average_are_left_out():
    params = {
        "w": jnp.ones(2),
        "z": jnp.array([1 + 2j], jnp.complex64),
        "step": jnp.int32(3),
        "flag": jnp.array(True),
        "key": jax.random.key(0),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    updates = params | {"w": jnp.ones(2), "z": jnp.array([2j], jnp.complex64)}
    tx = params_ema(0.5)
    state = tx.init(params)
    passed, state = jax.jit(tx.update)(updates, state, params)
    holes = ["step", "flag", "key", "masked"]
    assert all(state.params_ema[name] == optax.MaskedNode() for name in holes)
    assert state.params_ema["none"] is None
    np.testing.assert_array_equal(state.params_ema["w"], [1.5, 1.5])
    np.testing.assert_array_equal(state.params_ema["z"], np.array([1 + 3j], np.complex64))
    assert jax.tree.structure(passed) == jax.tree.structure(updates)


def test_a_param_without_an_update_stays():
    """``None``, masked and float0 updates; the float0 one is what JAX gives for an integer."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2), "n": jnp.int32(1)}
    float0 = np.zeros((2,), jax.dtypes.float0)
    updates = {"a": None, "b": optax.MaskedNode(), "c": float0, "n": float0[0]}
    tx = params_ema(0.5)
    _, state = tx.update(updates, tx.init(params), params)
    for name in "abc":
        np.testing.assert_array_equal(state.params_ema[name], params[name])
    _, grads = jax.value_and_grad(lambda p: jnp.sum(p["c"]), allow_int=True)(params)
    assert grads["n"].dtype == jax.dtypes.float0
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(state.params_ema["c"], [1.5, 1.5])


def test_vmap_over_an_ensemble():
    tx = optax.chain(optax.sgd(0.1), params_ema(ema.UniformAverage(), update_every=2))
    members = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)

    def run(member):
        def step(carry, k):
            live, state = carry
            updates, state = tx.update(grads(live, k), state, live)
            return (optax.apply_updates(live, updates), state), None

        carry, _ = jax.lax.scan(step, (member, tx.init(member)), jnp.arange(6, dtype=jnp.int32))
        return carry[1][-1]

    together = jax.jit(jax.vmap(run))(members)
    assert together.count.tolist() == [3, 3, 3]
    for i, member in enumerate(members):
        np.testing.assert_allclose(together.params_ema[i], run(member).params_ema, atol=1e-6)


def _primitives(jaxpr, inside=()):
    """(name of the primitive, name of the jitted function, the primitives it lies in)."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, equation.params.get("name"), inside
        for sub in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(sub, "jaxpr", sub)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner, (*inside, equation.primitive.name))


@pytest.mark.parametrize("update_every", [1, 3])
def test_between_updates_nothing_is_averaged(update_every, params):
    """With ``update_every`` the equation lies inside a cond; with 1 there is no cond at all."""
    tx = params_ema(0.9, update_every=update_every)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    found = list(_primitives(jaxpr.jaxpr))
    lerps = [inside for _, name, inside in found if name == "lerp"]
    conds = [primitive for primitive, _, _ in found if primitive == "cond"]
    assert len(lerps) == 2
    assert len(conds) == (update_every > 1)
    assert all(("cond" in inside) == (update_every > 1) for inside in lerps)
    adds = [i for primitive, _, i in found if primitive == "add"]
    assert adds, "the new params are computed outside, where apply_updates computes them too"


def test_init_of_shapes(params):
    """Under ``eval_shape`` and on ``ShapeDtypeStruct`` leaves: the same abstract state."""
    params["half"] = jnp.ones(3, jnp.bfloat16)
    params["n"] = jnp.int32(0)
    tx = params_ema(0.9)
    real = jax.eval_shape(lambda: tx.init(params))
    abstract = jax.eval_shape(tx.init, params)
    assert abstract == real
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    direct = tx.init(shapes)
    assert direct.params_ema == real.params_ema
    assert direct.params_ema["half"].dtype == jnp.float32


def test_init_keeps_sharding():
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {
        "w": jax.device_put(jnp.ones(4), sharding),
        "half": jax.device_put(jnp.ones(4, jnp.bfloat16), sharding),
    }
    tx = params_ema(0.9)
    for leaf in jax.tree.leaves(tx.init(params).params_ema):
        assert leaf.sharding == sharding
    shapes = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding), params
    )
    for leaf in jax.tree.leaves(tx.init(shapes).params_ema):
        assert leaf.sharding == sharding


def test_nothing_to_average():
    """A tree without leaves, or with all of them masked, is an empty group and no mistake."""
    tx = params_ema(0.9)
    for empty in ({}, {"a": optax.MaskedNode()}, {"a": None}):
        _, state = tx.update(empty, tx.init(empty), empty)
        assert state.params_ema == empty
    with pytest.raises(ema.ModelError, match=r"must hold a floating-point leaf.*2 of dtype int32"):
        tx.init({"a": jnp.int32(1), "b": jnp.int32(2)})


def test_float64_accumulator(params):
    """Finer than float32, for real and complex leaves; refused where JAX would narrow it."""
    with pytest.raises(ema.ArgumentError, match="jax_enable_x64"):
        params_ema(0.9, accumulator_dtype="float64").init(params)
    with jax.enable_x64(True):
        tree = {"w": jnp.ones(2, jnp.float32), "z": jnp.ones(2, jnp.complex64)}
        tx = params_ema(1 - 1e-9, accumulator_dtype=jnp.float64)
        _, state = jax.jit(tx.update)(tree, tx.init(tree), tree)
        assert {k: str(v.dtype) for k, v in state.params_ema.items()} == {
            "w": "float64",
            "z": "complex128",
        }
        np.testing.assert_allclose(state.params_ema["w"] - 1.0, 1e-9, rtol=1e-6)
        np.testing.assert_allclose(state.params_ema["z"].real - 1.0, 1e-9, rtol=1e-6)


def test_counters_saturate(params):
    """At the largest int32 they stay: a warmup does not begin again."""
    tx = params_ema(ema.RampWarmup(decay=0.9))
    largest = jnp.int32(2**31 - 1)
    state = tx.init(params)._replace(step=largest, count=largest)
    _, state = tx.update(params, state, params)
    assert int(state.step) == int(state.count) == 2**31 - 1


def test_debug_nans_finds_nothing(params):
    """Schedules divide by the count: none is asked for update 0."""
    tx = params_ema(ema.PowerFunction(gamma=3), update_after_step=2, update_every=2)
    with jax.debug_nans(True):
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(params, state, params)  # eagerly every operation is looked at
    assert np.isfinite(state.params_ema["bias"]).all()


@pytest.mark.parametrize("every", [1, 2, 3, 1000])
def test_updates_are_due_beyond_the_largest_step(every):
    """A loop of small steps reaches 2**31 in days; the average then went on at no step or at each."""
    tx = params_ema(0.5, update_every=every, update_after_step=5)
    params, zero = jnp.zeros(1), jnp.zeros(1)
    start = 2**31 - 1 - 4 * every
    state = tx.init(params)._replace(step=jnp.int32(start))

    def step(state, _):
        _, state = tx.update(zero, state, params)
        return state, state.count

    _, counts = jax.lax.scan(step, state, length=12 * every)
    steps = start + 1 + np.arange(12 * every)
    np.testing.assert_array_equal(counts, np.cumsum((steps - 5) % every == 0))
