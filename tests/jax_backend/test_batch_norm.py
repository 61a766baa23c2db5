"""``recalibrate_batch_norm`` for nnx and linen: exact statistics, and nothing else changed."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ema
from ema.jax_backend import params_ema
from ema.jax_backend.batch_norm import recalibrate_batch_norm
from ema.jax_backend.linen import EMATrainState
from ema.jax_backend.nnx import EMA, use_ema


class Network(nnx.Module):
    def __init__(self, rngs, momentum=0.9):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs, momentum=momentum)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.BatchNorm(4, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0, jnp.int32))

    def __call__(self, x, scale=None):
        self.calls[...] += jnp.int32(1)
        x = x if scale is None else x * scale
        return self.last(self.dropout(self.norm(self.first(x))))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4, name="first")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.BatchNorm(name="last")(x, use_running_average=not train)


def data(*sizes):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.normal(size=(n, 3)) * (k + 1) + k, jnp.float32) for k, n in enumerate(sizes)
    ]


def of(model):
    return {
        ".".join(map(str, path)): np.asarray(jax.random.key_data(v) if "key" in path else v)
        for path, v in nnx.to_flat_state(nnx.as_pure(nnx.state(model)))
    }


def check(mean, var, values):
    values = np.asarray(values, np.float64)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, values.var(0), rtol=1e-5)


@pytest.fixture
def linen():
    model = Linen()
    return model, model.init(jax.random.key(0), jnp.ones((2, 3)))


def test_nnx_has_the_statistics_of_all_data_together():
    """Also where batches differ in size and mean."""
    model, batches = Network(nnx.Rngs(0)), data(8, 8, 3)
    recalibrate_batch_norm(model, batches)
    check(model.norm.mean[...], model.norm.var[...], model.first(jnp.concatenate(batches)))


def test_linen_has_the_statistics_of_all_data_together(linen):
    model, variables = linen
    batches = data(8, 8, 3)
    before = jax.tree.map(np.array, variables)
    stats = recalibrate_batch_norm(model, batches, variables=variables)
    kernel, bias = variables["params"]["first"]["kernel"], variables["params"]["first"]["bias"]
    check(stats["norm"]["mean"], stats["norm"]["var"], jnp.concatenate(batches) @ kernel + bias)
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_nnx_and_linen_agree(linen):
    model, variables = linen
    twin = Network(nnx.Rngs(0))
    twin.first.kernel[...] = variables["params"]["first"]["kernel"]
    batches = data(8, 5)
    recalibrate_batch_norm(twin, batches)
    stats = recalibrate_batch_norm(model, batches, variables=variables)
    for name, layer in (("norm", twin.norm), ("last", twin.last)):
        np.testing.assert_allclose(stats[name]["mean"], layer.mean[...], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats[name]["var"], layer.var[...], rtol=1e-5)


@pytest.mark.parametrize("error", [False, True])
def test_only_batch_norm_layers_change(error):
    model = Network(nnx.Rngs(0), momentum=0.7)
    model.last.use_running_average = True
    before = of(model)
    if error:
        with pytest.raises(TypeError):
            recalibrate_batch_norm(model, [*data(4), jnp.ones((4, 7))])
    else:
        recalibrate_batch_norm(model, data(4, 4))
    changed = {name for name, value in of(model).items() if not np.array_equal(value, before[name])}
    names = {f"{layer}.{name}" for layer in ("norm", "last") for name in ("mean", "var")}
    assert changed == (set() if error else names)
    assert (model.norm.momentum, model.norm.use_running_average) == (0.7, False)
    assert (model.last.momentum, model.last.use_running_average) == (0.99, True)
    assert model.dropout.deterministic is False


def test_batches_of_every_kind(linen):
    model, variables = linen
    batches = data(4, 6)
    expected = Network(nnx.Rngs(0))
    recalibrate_batch_norm(expected, batches)
    jitted = nnx.jit(lambda model, batch: model(batch))
    jitted(Network(nnx.Rngs(0)), batches[0])  # a trace from training must not be taken
    for kind in (
        {"batches": [(x, jnp.zeros(4)) for x in batches]},
        {"batches": ({"x": x / 2, "scale": jnp.float32(2)} for x in batches)},
        {"batches": [np.asarray(x) for x in batches]},
        {"batches": batches, "forward": jitted},
    ):
        other = Network(nnx.Rngs(0))
        recalibrate_batch_norm(other, **kind)
        np.testing.assert_allclose(other.last.var[...], expected.last.var[...], rtol=1e-5)
    stats = recalibrate_batch_norm(model, batches, variables=variables)
    for kind in (
        {"batches": [(x, jnp.zeros(4)) for x in batches]},
        {"batches": [{"x": x} for x in batches]},
        {"batches": batches, "forward": lambda apply, x: apply(x, train=False)},
        {"batches": batches, "forward": lambda apply, x: jax.jit(apply)(x)},
    ):
        same = recalibrate_batch_norm(model, variables=variables, **kind)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), same, stats)


def test_a_jitted_linen_function_is_not_spoilt(linen):
    """Neither is its old trace taken nor does a new one keep gathering."""
    model, variables = linen
    batches = data(4)
    jitted = jax.jit(lambda x: model.apply(variables, x))
    before = jitted(batches[0])
    recalibrate_batch_norm(model, batches, variables=variables, forward=lambda apply, x: apply(x))
    fresh = jax.jit(lambda x: model.apply(variables, x))
    recalibrate_batch_norm(
        model, batches, variables=variables, forward=lambda apply, x: (apply(x), fresh(x))
    )
    np.testing.assert_allclose(fresh(batches[0]), before, rtol=1e-6)


def test_a_mask_and_a_layer_called_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            norm = nn.BatchNorm(use_running_average=True)
            return norm(x, mask=mask[:, None]) + norm(10 * x)

    (x,) = data(6)
    mask = jnp.array([True, True, False, True, False, False])
    variables = Twice().init(jax.random.key(0), x, mask)
    stats = recalibrate_batch_norm(Twice(), [{"x": x, "mask": mask}], variables=variables)
    seen = jnp.concatenate([x[mask], 10 * x])
    check(stats["BatchNorm_0"]["mean"], stats["BatchNorm_0"]["var"], seen)


def test_under_the_averaged_weights(linen):
    batches = data(8)
    model = Network(nnx.Rngs(0))
    average = EMA(model, 0.5)
    model.first.kernel[...] = 3.0 * model.first.kernel[...]
    average.update(model)
    with use_ema(model, average):
        recalibrate_batch_norm(model, batches)
    check(model.norm.mean[...], model.norm.var[...], average.apply_to(model).first(batches[0]))

    model, variables = linen
    state = EMATrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.chain(optax.sgd(1.0), params_ema(0.5)),
    ).apply_gradients(grads=variables["params"])
    stats = recalibrate_batch_norm(model, batches, variables=state.ema_variables)
    check(
        stats["norm"]["mean"],
        stats["norm"]["var"],
        batches[0] @ state.ema_params["first"]["kernel"],
    )


def test_mistakes(linen):
    model, variables = linen
    batches = data(4)
    with pytest.raises(ema.StateError, match="there were none"):
        recalibrate_batch_norm(Network(nnx.Rngs(0)), [])
    with pytest.raises(ema.StateError, match="use_running_average=True"):
        recalibrate_batch_norm(Network(nnx.Rngs(0)), batches, forward=lambda m, b: None)
    with pytest.raises(ema.ArgumentTypeError, match="unless `forward` is given, got str"):
        recalibrate_batch_norm(Network(nnx.Rngs(0)), ["x"])
    with pytest.raises(ema.ModelError, match="must have a BatchNorm layer"):
        recalibrate_batch_norm(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), batches)
    with pytest.raises(ema.ArgumentError, match="`variables` must be given"):
        recalibrate_batch_norm(model, batches)
    with pytest.raises(ema.ArgumentError, match="`variables` must not be given"):
        recalibrate_batch_norm(Network(nnx.Rngs(0)), batches, variables=variables)
    with pytest.raises(ema.ModelError, match="must hold the batch_stats"):
        recalibrate_batch_norm(model, batches, variables={"params": variables["params"]})
