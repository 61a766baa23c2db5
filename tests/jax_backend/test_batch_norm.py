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
    assert (model.last.momentum, model.last.use_running_average) == (0.99, False)
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


class Backbone(nnx.Module):
    """A frozen layer and a trained one; ``freeze`` says by which means it is frozen."""

    def __init__(self, freeze):
        self.freeze = freeze
        self.frozen = nnx.BatchNorm(3, use_running_average=freeze == "flag", rngs=nnx.Rngs(0))
        self.last = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def train(self, **attributes):
        super().train(**attributes)
        if self.freeze == "train":
            self.frozen.use_running_average = True

    def __call__(self, x):
        x = self.frozen(x, use_running_average=True) if self.freeze == "call" else self.frozen(x)
        return self.last(x)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("freeze", "mode"),
    [
        ("flag", "as constructed"),
        ("train", "as constructed"),
        ("train", "train"),
        ("train", "eval"),
        ("call", "as constructed"),
        ("call", "eval"),
    ],
)
def test_layers_that_an_nnx_model_keeps_in_evaluation_mode_keep_their_statistics(
    freeze, mode, jitted
):
    """And what comes after them sees what they make of their own statistics."""
    model, batches = Backbone(freeze), data(8, 8, 3)
    if mode != "as constructed":
        getattr(model, mode)()
    model.frozen.mean[...] = jnp.full(3, 5.0)
    model.frozen.var[...] = jnp.full(3, 4.0)
    flags = [layer.use_running_average for layer in (model.frozen, model.last)]
    forward = nnx.jit(lambda model, batch: model(batch)) if jitted else None
    recalibrate_batch_norm(model, batches, forward=forward)
    assert [layer.use_running_average for layer in (model.frozen, model.last)] == flags
    np.testing.assert_array_equal(model.frozen.mean[...], jnp.full(3, 5.0))
    np.testing.assert_array_equal(model.frozen.var[...], jnp.full(3, 4.0))
    seen = (jnp.concatenate(batches) - 5.0) / jnp.sqrt(4.0 + 1e-5)
    check(model.last.mean[...], model.last.var[...], seen)


def test_an_nnx_layer_that_only_some_batches_reach_has_the_statistics_of_these():
    """Also if the first one does not reach it, and if it held NaN."""

    class Sometimes(nnx.Module):
        def __init__(self):
            self.always = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.large = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.always(self.large(x) if len(x) > 4 else x)

    for start in (2.0, float("nan")):
        model, batches = Sometimes(), data(3, 8, 2, 6)
        model.large.mean[...] = jnp.full(3, start)
        recalibrate_batch_norm(model, batches)
        again = Sometimes()
        recalibrate_batch_norm(again, [batches[1], batches[3]])
        np.testing.assert_allclose(model.large.var[...], again.large.var[...], rtol=1e-6)
        np.testing.assert_allclose(model.large.mean[...], again.large.mean[...], rtol=1e-6)
        assert jnp.isfinite(model.always.var[...]).all()


def test_recalibrating_an_nnx_model_twice_gives_the_same():
    """The statistics that a layer starts with are those of the very batch."""
    model, batches = Network(nnx.Rngs(0)), data(8)
    recalibrate_batch_norm(model, batches)
    first = of(model)
    recalibrate_batch_norm(model, batches)
    for name, value in of(model).items():
        np.testing.assert_array_equal(value, first[name])


def test_an_nnx_model_that_keeps_all_layers_in_evaluation_mode_is_refused():
    class Closed(nnx.Sequential):
        def train(self, **attributes):
            self.eval(**attributes)

    model = Closed(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ema.ModelError, match=r"keep in evaluation mode, got `layers\.0`"):
        recalibrate_batch_norm(model, data(4))
    assert model.layers[0].use_running_average is False


class FrozenLinen(nn.Module):
    as_argument: bool

    @nn.compact
    def __call__(self, x, train=False):
        if self.as_argument:
            x = nn.BatchNorm(name="frozen")(x, True)
        else:
            x = nn.BatchNorm(use_running_average=True, name="frozen")(x)
        x = nn.Dropout(0.9)(x, deterministic=not train)
        x = nn.BatchNorm(name="last")(x, use_running_average=not train)
        return nn.Dropout(0.9, deterministic=not train)(inputs=x)


@pytest.mark.parametrize("as_argument", [False, True])
def test_layers_that_a_linen_model_keeps_in_evaluation_mode_keep_their_statistics(as_argument):
    """Where ``forward`` calls the model as in training; Dropout does nothing even then."""
    model, batches = FrozenLinen(as_argument), data(8, 8, 3)
    variables = model.init(jax.random.key(0), batches[0])
    variables["batch_stats"]["frozen"] = {"mean": jnp.full(3, 5.0), "var": jnp.full(3, 4.0)}
    stats = recalibrate_batch_norm(
        model, batches, variables=variables, forward=lambda apply, x: apply(x, train=True)
    )
    np.testing.assert_array_equal(stats["frozen"]["mean"], jnp.full(3, 5.0))
    np.testing.assert_array_equal(stats["frozen"]["var"], jnp.full(3, 4.0))
    seen = (jnp.concatenate(batches) - 5.0) / jnp.sqrt(4.0 + 1e-5)
    check(stats["last"]["mean"], stats["last"]["var"], seen)


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
