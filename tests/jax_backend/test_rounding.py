"""bfloat16 averages: the bits of ``ema.rounding``, unbiased, the same in a resumed run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema
from ema.jax_backend import get_params_ema, params_ema
from ema.jax_backend.update.equation import lerp
from ema.jax_backend.update.rounding import by_chance, round_up
from ema.rounding import key_of, mix, stream_of
from tests.jax_helpers import grads

BFLOAT16 = {"accumulator_dtype": jnp.bfloat16}


def rounded(values, name, count, seed):
    """float32 values as the docstring of ``ema.rounding`` rounds them, on Python numbers."""
    key = key_of(stream_of(name, seed), count)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).reshape(-1).tolist()
    halves = [(b + (mix(index ^ key) >> 16)) >> 16 & 0xFFFF for index, b in enumerate(bits)]
    return np.array(halves, np.uint16).reshape(np.shape(values))


def halves(array):
    return np.asarray(array).view(np.uint16)


SHAPES = [(), (1,), (7,), (33, 21), (3, 5, 2), (1, 1, 257), (0, 4)]


@pytest.mark.parametrize("weight", [1e-4, 0.3, 0.75])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_are_those_of_the_plain_python_rounding(shape, weight):
    """Three updates of a run, jitted, in a tree whose names have dots."""
    rng = np.random.default_rng(4)
    params = {"layers": [{"w": jnp.asarray(rng.normal(size=shape) * 100, jnp.float32)}]}
    tx = params_ema(1 - weight, seed=2**40 + 5, **BFLOAT16)
    state = tx.init(params)
    average = state.params_ema["layers"][0]["w"]
    w = jnp.float32(ema.ConstantDecay(decay=1 - weight).weight(1.0))
    for count in (1, 2, 3):
        target = jnp.asarray(rng.normal(size=shape), jnp.float32)
        live = {"layers": [{"w": target}]}
        _, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, live), state, live)
        exact = lerp(average.astype(jnp.float32), target, w)
        average = state.params_ema["layers"][0]["w"]
        assert average.dtype == jnp.bfloat16
        expected = rounded(exact, "layers.0.w", count, 2**40 + 5)
        np.testing.assert_array_equal(halves(average), expected)


def test_values_at_the_ends_of_the_range():
    """NaN stays NaN, Inf Inf; −0, the largest and halfway values are rounded as the bits say."""
    largest = np.finfo(np.float32).max
    values = [np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, largest, -largest, 1 + 2.0**-8, -1.5]
    values = np.array(values * 30, np.float32)
    # NaNs of which the sum, or the upper half, would be no NaN
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    values = np.concatenate([values, odd])
    key = jnp.uint32(key_of(stream_of("w", 7), 3))
    ours = np.asarray(jax.jit(lambda v: round_up(v, by_chance(v, key)))(values))
    finite = ~np.isnan(values)
    assert np.isnan(ours[~finite].astype(np.float32)).all()
    np.testing.assert_array_equal(halves(ours)[finite], rounded(values, "w", 3, 7)[finite])
    np.testing.assert_array_equal(ours[2:300:10].astype(np.float32), np.inf)
    assert np.signbit(ours[4:300:10].astype(np.float32)).all()
    assert len(set(halves(ours)[8:300:10].tolist())) == 2  # 1 + 2⁻⁸ goes both ways


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_propagates(value):
    tx = params_ema(0.75, **BFLOAT16)
    _, state = jax.jit(tx.update)(jnp.zeros(9), tx.init(jnp.ones(9)), jnp.full(9, value))
    np.testing.assert_array_equal(state.params_ema.astype(jnp.float32), np.float32(value))


def test_a_copy_is_rounded_to_nearest_and_weight_zero_changes_nothing():
    values = jnp.asarray(np.random.default_rng(0).normal(size=999), jnp.float32)
    for tx in (params_ema(0.0, **BFLOAT16), params_ema(0.9, update_after_step=1, **BFLOAT16)):
        zeros = jnp.zeros_like(values)
        _, state = jax.jit(tx.update)(zeros, tx.init(zeros), values)
        np.testing.assert_array_equal(halves(state.params_ema), halves(values.astype(jnp.bfloat16)))
        np.testing.assert_array_equal(
            halves(tx.init(values).params_ema), halves(values.astype(jnp.bfloat16))
        )
    tx = params_ema(1.0, **BFLOAT16)
    _, state = jax.jit(tx.update)(values, tx.init(values), values)
    np.testing.assert_array_equal(halves(state.params_ema), halves(values.astype(jnp.bfloat16)))


def test_to_nearest():
    """Ties to even, as a conversion rounds; also where the params are narrow."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=1001).astype(np.float32)
    values[:3] = [1 + 2.0**-8, 1 + 3 * 2.0**-8, np.nan]
    tx = params_ema(0.5, stochastic_rounding=False, **BFLOAT16)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params = jnp.asarray(values).astype(dtype)
        state = tx.init(params)
        start = state.params_ema.astype(jnp.float32)
        live = params * jnp.asarray(1.25, dtype)
        _, state = jax.jit(tx.update)(jnp.zeros_like(live), state, live)
        exact = lerp(start, live.astype(jnp.float32), jnp.float32(0.5))
        nearest = exact.astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(state.params_ema.astype(jnp.float32), nearest)


def test_it_is_unbiased():
    """The mean over a million elements of one update is the exact value, within 4 standard errors.

    Over 40 updates from the same state too, whose random bits are others.
    """
    size, fraction = 1 << 20, 0.2871
    step = 2.0**-7  # from 1 to the next bfloat16
    target = jnp.full(size, np.float32(1 + 2 * fraction * step), jnp.float32)
    exact = float(lerp(jnp.float32(1), target[0], jnp.float32(0.5)))
    probability = (exact - 1) / step
    tx = params_ema(0.5, **BFLOAT16)
    start = tx.init(jnp.ones(size))
    zeros = jnp.zeros(size)

    @jax.jit
    def mean(count):
        _, state = tx.update(zeros, start._replace(count=count), target)
        return jnp.mean((state.params_ema.astype(jnp.float32) - 1) / step)

    means = np.array([mean(jnp.int32(count)) for count in range(40)], np.float64)
    error = np.sqrt(probability * (1 - probability) / size)
    assert np.abs(means - probability).max() < 4.5 * error  # the largest of 40
    assert abs(means.mean() - probability) < 4 * error / np.sqrt(40)
    assert len(set(means.tolist())) > 30


def test_a_constant_target_is_reached():
    """20 000 updates at 0.9999: the mean follows the exact one; rounding to nearest stays put."""
    size = 4096

    def run(tx, size, steps):
        def step(state, _):
            _, state = tx.update(jnp.zeros(size), state, jnp.full(size, 1.1, jnp.float32))
            return state, None

        scan = jax.jit(lambda s: jax.lax.scan(step, s, length=steps)[0])
        return np.asarray(scan(tx.init(jnp.ones(size))).params_ema, np.float64)

    average = run(params_ema(0.9999, **BFLOAT16), size, 20_000)
    exact = 1.1 - 0.1 * 0.9999**20_000
    error = average.std() / np.sqrt(size)
    assert abs(average.mean() - exact) < 4 * error
    assert error < 0.001
    with pytest.warns(ema.EMAWarning, match="does not move at decay 0.9999"):
        stuck = params_ema(0.9999, stochastic_rounding=False, **BFLOAT16)
    assert set(run(stuck, 4, 100)) == {1.0}


@pytest.mark.parametrize("options", [{}, {"update_every": 3, "update_after_step": 2}])
def test_a_scan_a_resumed_run_and_single_steps_round_alike(options, params):
    """Nothing of the chance is in the state."""
    params = {**params, "half": jnp.linspace(-1, 1, 64).astype(jnp.bfloat16)}
    tx = optax.chain(optax.sgd(0.1), params_ema({"a": 0.99, "b": 0.9}, **BFLOAT16, **options))

    def step(carry, k):
        live, state = carry
        updates, state = tx.update(grads(live, k), state, live)
        return (optax.apply_updates(live, updates), state), None

    carry = start = (params, tx.init(params))
    jitted = jax.jit(step)
    for k in range(10):
        carry, _ = jitted(carry, jnp.int32(k))
        carry = jax.tree.map(lambda x: jnp.array(np.array(x)), carry)
    scanned, _ = jax.lax.scan(step, start, jnp.arange(10, dtype=jnp.int32), unroll=2)
    jax.tree.map(np.testing.assert_array_equal, scanned, carry)
    eager = start[1][-1]
    assert get_params_ema(carry[1], carry[0], "a")["half"].dtype == jnp.bfloat16
    assert eager.params_ema["a"]["bias"].dtype == jnp.bfloat16


def test_seed_name_and_count_each_change_the_bits():
    values = jnp.ones(4096)
    target = jnp.full(4096, 1.004, jnp.float32)

    def bits(seed=0, name="w", count=0):
        tx = params_ema(0.5, seed=seed, **BFLOAT16)
        state = tx.init({name: values})._replace(count=jnp.int32(count))
        _, state = jax.jit(tx.update)({name: jnp.zeros(4096)}, state, {name: target})
        return halves(state.params_ema[name])

    first = bits()
    for other in (bits(seed=1), bits(seed=2**63), bits(name="v"), bits(count=1)):
        share = np.mean(first != other)
        assert 0.2 < share < 0.6
    np.testing.assert_array_equal(first, bits())


def test_eager_updates_give_the_bits_of_jitted_ones(params):
    tx = params_ema(0.99, **BFLOAT16)
    live = jax.tree.map(lambda p: p + 1, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, eager = tx.update(zeros, tx.init(params), live)
    _, jitted = jax.jit(tx.update)(zeros, tx.init(params), live)
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)


def test_complex_and_double_params():
    """A complex average stays complex64; float64 params are averaged in bfloat16 too."""
    with jax.enable_x64(True):
        tree = {"z": jnp.ones(2, jnp.complex128), "d": jnp.ones(2, jnp.float64)}
        tx = params_ema(0.9, **BFLOAT16)
        _, state = jax.jit(tx.update)(tree, tx.init(tree), tree)
        dtypes = {name: str(leaf.dtype) for name, leaf in state.params_ema.items()}
        assert dtypes == {"z": "complex64", "d": "bfloat16"}
        np.testing.assert_allclose(state.params_ema["z"], 1.1, rtol=1e-6)


def test_gradients_pass_through_the_rounding(params):
    """Its expected value is the identity."""
    tx = params_ema(0.75, **BFLOAT16)
    state = tx.init(params)

    def loss(updates):
        _, after = tx.update(updates, state, params)
        return jnp.sum(after.params_ema["bias"].astype(jnp.float32))

    grads = jax.grad(loss)(jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(grads["bias"], 0.25, rtol=1e-2)


def test_the_update_is_one_loop_a_leaf_without_temporaries():
    """XLA's own account: no number of random bits is ever written out."""
    tx = optax.chain(optax.sgd(0.1), params_ema(0.999, **BFLOAT16))
    params = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1 << 18,), (512, 512))]
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4096
    assert program.cost_analysis()["bytes accessed"] / (1 << 19) < 20.1  # 12 of sgd, 8 of ours
