"""Programs of Flax, and trees like those of Equinox, that hold more than plain arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx, struct
from flax.core import meta

import ema
from ema.jax_backend import get_params_ema, load_params_ema, params_ema, save_params_ema
from ema.jax_backend.nnx import EMA, use_ema


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def trained():
    """A model, an optimizer with an average and an average beside them, after a few steps."""
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), params_ema(0.5))
    optimizer, average = nnx.Optimizer(model, tx, wrt=nnx.Param), EMA(model, 0.5)
    for k in range(3):
        grads = nnx.grad(lambda m, k=k: ((m(jnp.ones((1, 4))) - k) ** 2).sum())(model)
        optimizer.update(model, grads)
        average.update(model)
    return model, optimizer, average


# --- a swap inside transformations ----------------------------------------------------------------


def evaluate(model, source, x):
    with use_ema(model, source):
        return model(x)


def in_jax_jit(model, source, x):
    parts = [nnx.split(each) for each in (model, source)]

    @jax.jit
    def run(states, x):
        both = [nnx.merge(graph, s) for (graph, _), s in zip(parts, states, strict=True)]
        return evaluate(*both, x)

    return run([state for _, state in parts], x)


WAYS = {
    "nnx.jit": nnx.jit(evaluate),
    "jax.jit": in_jax_jit,
    "nnx.remat": nnx.remat(evaluate),
    "nnx.jit of nnx.remat": nnx.jit(nnx.remat(evaluate)),
    "nnx.vmap": nnx.vmap(evaluate, in_axes=(None, None, 0)),
}


@pytest.mark.parametrize("source", [1, 2], ids=["chain", "EMA"])
@pytest.mark.parametrize("way", WAYS)
def test_a_swap_gives_inside_a_transformation_what_it_gives_outside(trained, way, source):
    model, x = trained[0], jnp.arange(4.0).reshape(1, 4)
    live = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model)))
    found = WAYS[way](model, trained[source], x)
    np.testing.assert_allclose(found, evaluate(model, trained[source], x), rtol=1e-6)
    assert not np.allclose(found, model(x))
    equal(nnx.as_pure(nnx.state(model)), live)


def test_a_swap_has_shapes(trained):
    model, optimizer, average = trained
    for source in (optimizer, average):
        found = nnx.eval_shape(evaluate, model, source, jnp.ones((5, 4)))
        assert found.shape == (5, 2)


def test_what_is_raised_inside_a_compiled_swap_leaves_the_live_weights(trained):
    model, optimizer, _ = trained
    live = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model)))

    @nnx.jit
    def fail(model, optimizer):
        with use_ema(model, optimizer):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail(model, optimizer)
    equal(nnx.as_pure(nnx.state(model)), live)


# --- Variables of a user's own --------------------------------------------------------------------


class Shown(nnx.Param):
    """Shows other values than it holds."""

    def get_value(self, **kwargs):
        return super().get_value(**kwargs) * 2


class Written(nnx.Param):
    """Holds other values than are written."""

    def set_value(self, value, **kwargs):
        super().set_value(value + 1, **kwargs)


def hooked(value):
    return nnx.Param(
        value,
        on_get_value=lambda _, v: v * 3,
        on_set_value=lambda _, v: v - 5,
        on_create_value=lambda _, v: v * 7,
    )


class Holder(nnx.Module):
    def __init__(self, variable):
        self.w = variable


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("make", [Shown, Written, hooked], ids=["get", "set", "hooks"])
def test_what_a_variable_holds_is_averaged_whatever_it_shows(make, dtype):
    model = Holder(make(jnp.array([1.0, 2.0], dtype)))
    start = jnp.array(model.w.get_raw_value(), jnp.float32)
    average = EMA(model, 0.5, compensated=True)
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.0), params_ema(0.5)), wrt=nnx.Param)
    model.w.set_raw_value((start + 4).astype(dtype))
    for _ in range(2):
        average.update(model)
        optimizer.update(model, nnx.state(model, nnx.Param))
    expected = start + 3  # 4 · (1 − 0.5²)
    equal(average.averaged_parameters()["w"], expected)
    equal(get_params_ema(optimizer)["w"], expected)
    shown = average.apply_to(model).w
    assert type(shown) is type(model.w)
    equal(shown.get_raw_value(), expected.astype(dtype))
    live = model.w.get_raw_value()
    for source in (average, optimizer):
        with use_ema(model, source):
            equal(model.w.get_raw_value(), expected.astype(dtype))
        equal(model.w.get_raw_value(), live)


@pytest.mark.parametrize("value", [1.0, 1.0 + 2j])
def test_a_python_number_is_averaged_as_a_scalar(value):
    model = Holder(nnx.Param(value))
    average = EMA(model, 0.5)
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.0), params_ema(0.5)), wrt=nnx.Param)
    model.w.set_raw_value(value + 2)
    average.update(model)
    optimizer.update(model, nnx.state(model, nnx.Param))
    for found in (average.averaged_parameters()["w"], get_params_ema(optimizer)["w"]):
        assert (found.shape, found.dtype.itemsize) == ((), 4 if value == 1.0 else 8)
        assert found == value + 1
    with use_ema(model, average):
        assert model.w.get_raw_value() == value + 1
    assert model.w.get_raw_value() == value + 2


# --- boxes of linen -------------------------------------------------------------------------------


@struct.dataclass
class Mine(meta.AxisMetadata):
    """A box of a user's own, whose field has another name."""

    content: Any
    note: str = struct.field(pytree_node=False, default="")

    def unbox(self):
        return self.content

    def replace_boxed(self, val):
        return self.replace(content=val)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


BOXES: dict[str, Callable[[Any], Any]] = {
    "Partitioned": lambda x: nn.Partitioned(x, names=(None, "model")),
    "LogicallyPartitioned": lambda x: nn.LogicallyPartitioned(x, names=(None, "heads")),
    "twice": lambda x: nn.Partitioned(Mine(x), names=(None, "model")),
    "mine": lambda x: Mine(x, note="kept"),
}
PLAIN = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3), "n": jnp.arange(2)}, "bias": jnp.ones(3)}


def boxed(box, params=PLAIN):
    return {**params, "a": {**params["a"], "kernel": box(params["a"]["kernel"])}}


OPTIONS = {
    "plain": {},
    "compensated": {"compensated": True},
    "narrow": {"accumulator_dtype": jnp.bfloat16, "seed": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_a_boxed_leaf_has_the_name_and_the_bits_of_a_plain_one(box, options, tmp_path):
    tx = params_ema(0.9, **options)
    moved = jax.tree.map(lambda p: p + 1, PLAIN)
    _, state = tx.update(None, tx.init(boxed(box)), boxed(box, moved))
    _, alone = tx.update(None, tx.init(PLAIN), moved)
    equal(jax.tree.leaves(state), jax.tree.leaves(alone))
    files = save_params_ema(tmp_path / "boxed", state), save_params_ema(tmp_path / "plain", alone)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {"a.kernel", "bias"} <= safetensors.numpy.load_file(files[0]).keys()
    for file in files:
        equal(load_params_ema(file, tx.init(boxed(box))), state)
        equal(load_params_ema(file, tx.init(PLAIN)), alone)
    found = get_params_ema(state, boxed(box, moved))
    assert jax.tree.structure(found) == jax.tree.structure(boxed(box))
    equal(jax.tree.leaves(found), jax.tree.leaves(get_params_ema(alone, moved)))
    equal(get_params_ema(state, moved), get_params_ema(alone, moved))


def test_a_module_with_partitioned_kernels_trains_and_averages():
    kernel = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    module, x = nn.Dense(2, kernel_init=kernel), jnp.ones((1, 3))
    params = module.init(jax.random.key(0), x)["params"]
    tx = optax.chain(optax.sgd(0.1), params_ema(0.5))
    state = tx.init(params)
    grads = jax.grad(lambda p: module.apply({"params": p}, x).sum())(params)
    updates, state = jax.jit(tx.update)(grads, state, params)
    params = optax.apply_updates(params, updates)
    averaged = get_params_ema(state, params)
    np.testing.assert_allclose(averaged["kernel"].value, 0.95, rtol=1e-6)
    assert module.apply({"params": averaged}, x).shape == (1, 2)


# --- functions and strings among the leaves -------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A module as Equinox has it: whatever it is made of is a leaf."""

    weight: Any
    activation: Any
    name: Any
    flag: Any
    inner: Any = None


def layer(value):
    return Layer(
        jnp.full(3, value), jnp.tanh, "first", True, Layer(value, [len], b"x", 3, np.float32(value))
    )


def arrays_of(tree):
    """What ``eqx.filter(tree, eqx.is_inexact_array)`` gives."""
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else None, tree)


def test_what_is_no_number_is_left_alone_and_given_back():
    tx = params_ema(0.5)
    state = tx.init(layer(1.0))
    _, state = tx.update(None, state, layer(3.0))
    found = get_params_ema(state, layer(3.0))
    np.testing.assert_array_equal(found.weight, 2.0)
    assert (found.inner.weight, found.inner.inner) == (2.0, 2.0)
    assert (found.activation, found.name, found.flag) == (jnp.tanh, "first", True)
    assert (found.inner.activation, found.inner.name, found.inner.flag) == ([len], b"x", 3)


def test_an_average_of_the_arrays_takes_the_whole_module_as_params(tmp_path):
    """As Equinox's users do: the optimizer gets the arrays, ``update`` and the reader the module."""
    tx = optax.chain(optax.adam(1e-3), params_ema(0.5))
    module, arrays = layer(1.0), arrays_of(layer(1.0))
    state = tx.init(arrays)
    grads = jax.tree.map(jnp.ones_like, arrays)
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(grads, state, module)
    found = get_params_ema(state, module)
    np.testing.assert_allclose(found.weight, 1.0 - 0.5e-3, rtol=1e-6)
    assert (found.activation, found.inner.weight) == (jnp.tanh, 1.0)
    file = save_params_ema(tmp_path, state)
    assert list(safetensors.numpy.load_file(file)) == ["weight"]
    equal(get_params_ema(load_params_ema(file, tx.init(arrays)), arrays).weight, found.weight)


def test_a_number_where_there_was_none_is_refused():
    with pytest.raises(ema.ModelError, match="unexpected: `b`"):
        get_params_ema(
            params_ema(0.5).init({"a": jnp.ones(2), "b": None}),
            {"a": jnp.ones(2), "b": jnp.ones(2)},
        )


def test_nothing_to_average_names_what_there_is():
    with pytest.raises(ema.ModelError, match=r"got 3 of dtype bool, builtin_function.*, str"):
        params_ema(0.5).init({"a": "x", "b": len, "c": True})


# --- members that were vmapped --------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_state_of_vmapped_members_is_saved_stacked_and_read_back(options, tmp_path):
    tx = optax.chain(optax.sgd(0.1), params_ema(0.5, **options))
    params = {"w": jnp.arange(12.0).reshape(4, 3)}
    state = jax.vmap(tx.init)(params)
    for _ in range(3):
        _, state = jax.vmap(tx.update)(params, state, params)
    file = save_params_ema(tmp_path, state, decay=0.5)
    loaded = load_params_ema(file, jax.vmap(tx.init)(params))
    equal(loaded, state)
    assert loaded[-1].count.shape == (4,)
    equal(load_params_ema(file, tx.init(params))[-1].params_ema, state[-1].params_ema)


def test_layers_under_an_optimizer_of_their_own_are_saved_with_the_others(tmp_path):
    tx = params_ema(0.5)
    one, many = {"embedding": jnp.ones((3, 2))}, {"layers": jnp.ones((5, 2, 2))}
    state = {"one": tx.init(one), "scanned": jax.vmap(tx.init)(many)}
    file = save_params_ema(tmp_path, state)
    assert sorted(safetensors.numpy.load_file(file)) == ["embedding", "layers"]
    equal(load_params_ema(file, state), state)


def test_members_that_went_different_ways_are_saved_one_by_one(tmp_path):
    tx = params_ema(0.5, on_nonfinite="skip")
    params = {"w": jnp.ones((3, 2)).at[1, 0].set(jnp.nan)}
    state = jax.vmap(tx.init)({"w": jnp.ones((3, 2))})
    _, state = jax.vmap(tx.update, in_axes=(None, 0, 0))(None, state, params)
    np.testing.assert_array_equal(state.skipped, [0, 1, 0])
    with pytest.raises(
        ema.ArgumentError, match=r"got `0`, `1` for its members: save each member by itself"
    ):
        save_params_ema(tmp_path, state)
    assert list(tmp_path.iterdir()) == []
    members = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(3)]
    files = [save_params_ema(tmp_path / f"{i}", member) for i, member in enumerate(members)]
    again = [load_params_ema(file, members[0]) for file in files]
    equal(jax.tree.map(lambda *leaves: jnp.stack(leaves), *again), state)


# --- statistics -----------------------------------------------------------------------------------


class Normed(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
        self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_teacher_in_training_mode_does_not_change_the_average_of_the_statistics(compiled):
    model, x = Normed(), jnp.arange(8.0).reshape(4, 2)
    average = EMA(model, 0.9, only=(nnx.Param, nnx.BatchStat))
    model(x)  # its own statistics move
    average.update(model)
    teacher = average.apply_to(model)
    before = jax.tree.map(jnp.copy, average.state())
    own = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model)))
    call = nnx.jit(lambda m, x: m(x)) if compiled else Normed.__call__
    teacher.train()
    call(teacher, 100 * x)
    equal(average.state(), before)
    equal(nnx.as_pure(nnx.state(model)), own)
    with use_ema(model, average):  # in spite of what the teacher has written
        equal(model.norm.mean.get_value(), before.params_ema["norm"]["mean"])
    average.update(model)
    equal(teacher.norm.mean.get_value(), average.state().params_ema["norm"]["mean"])
    assert teacher.linear.kernel is average.params.linear.kernel


def test_a_teacher_of_linen_hands_its_statistics_back_and_changes_none():
    """``apply`` returns them; the average is a value that no call can write to."""
    from ema.jax_backend.linen import EMATrainState

    module = nn.BatchNorm(use_running_average=False, momentum=0.5)
    variables = module.init(jax.random.key(0), jnp.ones((4, 2)))
    state = EMATrainState.create(
        apply_fn=module.apply,
        params=variables["params"],
        tx=optax.chain(optax.sgd(0.1), params_ema(0.9)),
        batch_stats=variables["batch_stats"],
        batch_stats_tx=params_ema(0.9),
    )
    before = jax.tree.map(jnp.copy, state.ema_batch_stats)
    _, moved = state.apply_fn(state.ema_variables, 100 * jnp.ones((4, 2)), mutable=["batch_stats"])
    assert not np.allclose(moved["batch_stats"]["mean"], before["mean"])
    equal(state.ema_batch_stats, before)
