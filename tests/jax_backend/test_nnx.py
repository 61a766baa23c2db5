"""``ema.jax_backend.nnx``: what flax tests of ``nnx.EMA``, what fails there, and the swap."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ema
from ema import ModelError
from ema.jax_backend import get_params_ema, params_ema
from ema.jax_backend.nnx import EMA, use_ema

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)


class Network(nnx.Module):
    """All that a module may hold besides weights."""

    def __init__(self, rngs, dtype=jnp.float32):
        self.first = nnx.Linear(4, 4, rngs=rngs, param_dtype=dtype)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0, jnp.int32))
        self.table = nnx.Param(jnp.arange(3))
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs, param_dtype=dtype) for _ in range(2)])
        self.tied = self.first

    def __call__(self, x):
        self.calls[...] += jnp.int32(1)
        dtype = self.first.kernel.dtype
        x = self.dropout(self.norm(self.first(x.astype(dtype)).astype(jnp.float32))).astype(dtype)
        for block in self.blocks:
            x = block(x)
        return x


def double(model):
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if jnp.issubdtype(variable.dtype, jnp.inexact):
            variable[...] = variable[...] + variable[...]


def arrays(tree):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(nnx.as_pure(tree))]


# ---- flax/tests/nnx/ema_test.py; its test of sharding is in eight_devices.py


def test_initialization_and_update():
    model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    initial = jnp.copy(model.kernel[...])
    average = EMA(model, decay=0.9)
    np.testing.assert_allclose(average.params.kernel[...], initial)
    double(model)
    average.update(model)
    expected = 0.9 * initial + 0.1 * (2.0 * initial)
    np.testing.assert_allclose(average.params.kernel[...], expected, rtol=1e-6)


def test_the_example_of_flax():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(1e-3), wrt=nnx.Param)
    average = EMA(model, decay=0.9)
    ema_model = average.apply_to(model)
    original = ema_model.kernel[...]

    @nnx.jit
    def train_step(model, optimizer, average, x):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
        optimizer.update(model, grads)
        average.update(model)
        return loss

    train_step(model, optimizer, average, X)
    assert isinstance(ema_model.kernel, nnx.Param)
    assert ema_model.kernel is average.params.kernel
    assert ema_model.kernel is not model.kernel
    assert not np.array_equal(ema_model.kernel[...], original)


def test_apply_to_follows_later_updates():
    model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    average = EMA(model, decay=0.9)
    ema_model = average.apply_to(model)
    double(model)
    average.update(model)
    np.testing.assert_array_equal(ema_model.kernel[...], average.params.kernel[...])
    assert not np.allclose(ema_model.kernel[...], model.kernel[...])


# ---- what fails with nnx.EMA


def test_bfloat16_moves_at_0_9999():
    """And its model has bfloat16 weights, rounded from the float32 average at every update."""
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    model.kernel[...] = jnp.ones((4, 4), jnp.bfloat16)
    average = EMA(model, 0.9999)
    ema_model = average.apply_to(model)
    model.kernel[...] = jnp.full((4, 4), 3.0, jnp.bfloat16)
    step = nnx.jit(lambda average, model: average.update(model))
    for _ in range(200):
        step(average, model)
    expected = 3.0 - 2.0 * 0.9999**200
    np.testing.assert_allclose(average.averaged_parameters()["kernel"], expected, rtol=1e-6)
    assert ema_model.kernel.dtype == jnp.bfloat16
    np.testing.assert_allclose(ema_model.kernel[...].astype(jnp.float32), expected, rtol=4e-3)
    assert float(ema_model.kernel[0, 0].astype(jnp.float32)) > 1.0


@pytest.mark.parametrize("only", [nnx.Param, ...])
def test_dropout_integers_keys_and_ties(only):
    """Whatever the filter, they are left alone, and the model of the averages has the live ones."""
    model = Network(nnx.Rngs(0))
    average = EMA(model, 0.5, only=only)
    before = arrays(average.averaged_parameters())
    double(model)
    model(X)
    nnx.jit(lambda average, model: average.update(model))(average, model)
    ema_model = average.apply_to(model)
    assert ema_model.tied is ema_model.first
    assert ema_model.calls is model.calls
    assert ema_model.table is model.table
    assert ema_model.dropout.rngs.key is model.dropout.rngs.key
    assert ema_model(X).shape == (8, 4)
    kernel = [p for p, v in nnx.to_flat_state(average.params) if v.shape == (4, 4)]
    assert len(kernel) == 3  # the tied one once
    after = arrays(average.averaged_parameters())
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_batch_statistics_are_averaged_when_asked_and_only_then():
    for only, averaged in ((nnx.Param, False), ((nnx.Param, nnx.BatchStat), True)):
        model = Network(nnx.Rngs(0))
        average = EMA(model, 0.5, only=only)
        ema_model = average.apply_to(model)
        model(X + 1.0)
        average.update(model)
        assert (ema_model.norm.mean is model.norm.mean) == (not averaged)
        if averaged:
            np.testing.assert_allclose(
                ema_model.norm.mean[...], 0.5 * model.norm.mean[...], rtol=1e-6
            )


# ---- what else it promises


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("decay", [ema.RampWarmup(decay=0.9), ema.UniformAverage()])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"compensated": True, "on_nonfinite": "skip"},
        {"accumulator_dtype": jnp.bfloat16, "seed": 3},
    ],
    ids=["plain", "precise", "narrow"],
)
def test_it_has_the_bits_of_the_chain(dtype, decay, more):
    """Donated, under ``nnx.jit``, with ``update_every``; the initial average aliases nothing."""
    options = {"update_every": 2, "update_after_step": 1, **more}
    model = Network(nnx.Rngs(0), dtype)
    model.eval()
    tx = optax.chain(optax.sgd(0.1), params_ema(decay, **options))
    weights = nnx.All(nnx.Param, lambda path, _: path != ("table",))
    optimizer = nnx.Optimizer(model, tx, wrt=weights)
    average = EMA(model, decay, **options)

    def train_step(model, optimizer, average):
        diff = nnx.DiffState(0, weights)
        grads = nnx.grad(lambda m: jnp.mean(m(X) ** 2), argnums=diff)(model)
        optimizer.update(model, grads)
        average.update(model)

    step = nnx.jit(train_step, donate_argnums=(0, 1, 2))
    for _ in range(7):
        step(model, optimizer, average)
    expected = get_params_ema(optimizer)
    jax.tree.map(np.testing.assert_array_equal, average.averaged_parameters(), expected)
    assert (int(average.step[...]), int(average.count[...])) == (7, 3)
    if "compensated" in more:
        remainder = optimizer.opt_state[-1].remainder
        jax.tree.map(
            np.testing.assert_array_equal, nnx.as_pure(average.remainder), nnx.as_pure(remainder)
        )
        assert int(average.skipped[...]) == 0


def test_a_model_that_is_not_finite():
    """Skipped under ``nnx.jit``; raised eagerly; refused where nothing can be raised."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    skips, raises = EMA(model, 0.5, on_nonfinite="skip"), EMA(model, 0.5, on_nonfinite="raise")
    before = jax.tree.map(jnp.copy, skips.averaged_parameters())
    raises.update(model)
    model.bias[...] = model.bias[...].at[1].set(jnp.nan)
    nnx.jit(lambda average, model: average.update(model))(skips, model)
    assert [int(n[...]) for n in (skips.step, skips.count, skips.skipped)] == [1, 0, 1]
    jax.tree.map(np.testing.assert_array_equal, skips.averaged_parameters(), before)
    with pytest.raises(ema.StateError, match="hold NaN or Inf, nothing was averaged: `bias`"):
        raises.update(model)
    assert int(raises.step[...]) == 1
    with pytest.raises(ema.ArgumentError, match="must not be 'raise'"):
        nnx.jit(lambda average, model: average.update(model))(raises, model)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_aliases_nothing_of_the_model(dtype):
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0), param_dtype=dtype)
    average = EMA(model, 0.5)
    nnx.jit(double, donate_argnums=0)(model)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.as_pure(nnx.state(average))))


def test_inside_nnx_scan():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    average = EMA(model, ema.UniformAverage())
    twin, twin_average = nnx.clone((model, average))

    def body(carry, x):
        model, average = carry
        model.kernel[...] = model.kernel[...] + x
        average.update(model)
        return carry

    xs = jnp.arange(5).astype(jnp.bfloat16)
    nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)((model, average), xs)
    for x in xs:
        body((twin, twin_average), x)
    np.testing.assert_array_equal(arrays(average)[0], arrays(twin_average)[0])
    jax.tree.map(
        np.testing.assert_array_equal,
        average.averaged_parameters(),
        twin_average.averaged_parameters(),
    )
    assert int(average.count[...]) == 5


def test_metadata_is_kept_and_a_copy_is_independent():
    kernel_init = nnx.with_metadata(nnx.initializers.ones, role="kernel")
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0), kernel_init=kernel_init)
    average = EMA(model, 0.5)
    assert average.params.kernel.get_metadata() == model.kernel.get_metadata()
    twin = nnx.clone(average)
    double(model)
    twin.update(model)
    np.testing.assert_array_equal(average.params.kernel[...], 1.0)
    np.testing.assert_array_equal(twin.params.kernel[...], 1.5)


def test_the_state_of_a_model_will_do():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    average = EMA(nnx.state(model), 0.5)
    double(model)
    average.update(nnx.state(model))
    np.testing.assert_allclose(average.params["kernel"][...], 0.75 * model.kernel[...])


def test_in_tree_mode():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    average = EMA(model, 0.5, graph=False)
    double(model)
    nnx.jit(lambda average, model: average.update(model), graph=False)(average, model)
    np.testing.assert_allclose(average.params.kernel[...], 0.75 * model.kernel[...])
    assert average.apply_to(model).kernel is average.params.kernel


def test_another_model_is_refused():
    model, other = (nnx.Linear(2, n, rngs=nnx.Rngs(0)) for n in (2, 3))
    average = EMA(model, 0.5)
    for call in (average.update, average.apply_to):
        with pytest.raises(ema.ModelError, match=r"`bias`.* has shape \(3,\)"):
            call(other)
    with pytest.raises(ema.ModelError, match="missing: `bias`"):
        average.apply_to(nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0)))
    assert int(average.step[...]) == 0
    with pytest.raises(ema.ModelError, match="must hold a floating-point Variable"):
        EMA(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), 0.5)
    with pytest.raises(ema.ArgumentError, match=r"`decay` must lie in \[0, 1\]"):
        EMA(model, 1.5)
    with pytest.raises(ema.ArgumentError, match="`update_every` must be at least 1"):
        EMA(model, 0.5, update_every=0)


# ---- the swap


def trained(decay=0.5, **chain):
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    tx = optax.chain(optax.sgd(0.5), params_ema(decay, **chain))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    average = EMA(model, 0.5)
    for _ in range(3):
        grads = nnx.grad(lambda m: jnp.mean(m(X.astype(jnp.bfloat16)) ** 2))(model)
        optimizer.update(model, grads)
        average.update(model)
    return model, optimizer, average


@pytest.mark.parametrize("of", ["optimizer", "average"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_use_ema_swaps_in_and_back(of, error):
    model, optimizer, average = trained()
    live, kernel = arrays(nnx.state(model)), model.kernel
    expected = get_params_ema(optimizer, nnx.state(model, nnx.Param))["kernel"]
    source = optimizer if of == "optimizer" else average
    raises = pytest.raises(error) if error else contextlib.nullcontext()
    with raises, use_ema(model, source) as same:
        assert same is model
        assert model.kernel is kernel
        np.testing.assert_array_equal(model.kernel[...], expected)
        assert model.kernel.dtype == jnp.bfloat16
        if error:
            raise error
    for a, b in zip(arrays(nnx.state(model)), live, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(model.kernel[...], expected)


def test_use_ema_by_name():
    model, optimizer, _ = trained({"short": 0.0, "long": 1.0})
    live = model.kernel[...]
    with use_ema(model, optimizer, "short"):
        np.testing.assert_array_equal(model.kernel[...], live)
    with use_ema(model, optimizer, "long"):
        assert not np.array_equal(model.kernel[...], live)
    with pytest.raises(ema.ArgumentError, match="must be one of"), use_ema(model, optimizer):
        pass
    np.testing.assert_array_equal(model.kernel[...], live)


def test_use_ema_on_another_model_changes_nothing():
    _, optimizer, average = trained()
    other = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    before = arrays(nnx.state(other))
    for source in (optimizer, average):
        with pytest.raises(ema.ModelError, match="shape"), use_ema(other, source):
            pass
    for a, b in zip(arrays(nnx.state(other)), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_average_donated_in_the_block_is_reported():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.5), params_ema(0.5)), wrt=nnx.Param)
    consume = nnx.jit(double, donate_argnums=0)
    with pytest.raises(ema.StateError, match="donated"), use_ema(model, optimizer):
        consume(model)


def test_a_variable_without_an_array_is_named():
    model = nnx.Dict(scales=nnx.Param({"a": jnp.ones(2)}), weight=nnx.Param(jnp.ones(2)))
    with pytest.raises(ModelError, match="`scales` holds a dict, but EMA averages arrays"):
        EMA(model, 0.9)
    average = EMA(model, 0.9, only=nnx.PathContains("weight"))
    assert [path for path, _ in nnx.to_flat_state(average.params)] == [("weight",)]


def test_a_warning_while_an_average_is_made_points_at_the_line_of_the_user():
    """And not into flax, whose metaclass calls ``EMA.__init__``."""
    with pytest.warns(ema.EMAWarning, match="stochastic_rounding") as seen:
        EMA(Network(nnx.Rngs(0)), accumulator_dtype=jnp.bfloat16, stochastic_rounding=False)
    assert [warning.filename for warning in seen] == [__file__]
