"""``save_params_ema`` and ``load_params_ema``: any optimizer state, one leaf at a time."""

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import ema
from ema import ArgumentError, CheckpointError, ModelError
from ema.checkpoint import read_state
from ema.jax_backend import get_params_ema, load_params_ema, params_ema, save_params_ema
from ema.jax_backend.nnx import EMA


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "layers": [{"kernel": jnp.asarray(rng.normal(size=(4, 2)), jnp.bfloat16)}],
        "phase": jnp.asarray(rng.normal(size=3), jnp.complex64),
        "table": jnp.arange(3),
        "scale": jnp.asarray(2.0),
        "none": jnp.zeros((0, 2)),
    }


def train(tx, params, opt_state, steps, seed):
    @jax.jit
    def step(params, opt_state, key):
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        updates = structure.unflatten(
            [
                jnp.zeros_like(leaf)
                if jnp.issubdtype(leaf.dtype, jnp.integer)
                else jax.random.normal(k, leaf.shape, leaf.dtype)
                for k, leaf in zip(keys, leaves, strict=True)
            ]
        )
        updates, opt_state = tx.update(updates, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for i in range(steps):
        params, opt_state = step(params, opt_state, jax.random.fold_in(jax.random.key(seed), i))
    return params, opt_state


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_resumed_from_the_file_equals_uninterrupted(tmp_path, params):
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9), params_ema(ema.HalfLife(steps=5), update_every=2)
    )
    live, state = train(tx, params, tx.init(params), 5, 1)
    save_params_ema(tmp_path, state)
    fresh = (state[0], tx.init(params)[1])
    resumed = load_params_ema(tmp_path, fresh)
    assert_same(resumed, state)
    assert_same(train(tx, live, resumed, 5, 2), train(tx, live, state, 5, 2))


def test_the_file_says_what_it_was_told(tmp_path, params):
    tx = params_ema(decay=0.9)
    file = save_params_ema(
        tmp_path,
        tx.init(params),
        decay=0.9,
        update_after_step=2,
        update_every=3,
        metadata={"run": "17"},
    )
    stored = read_state(file)
    assert list(stored.tensors) == ["layers.0.kernel", "none", "phase", "scale"]
    assert stored.record == ema.checkpoint.Record(
        step=0,
        count=0,
        schedule=ema.ConstantDecay(decay=0.9),
        update_after_step=2,
        update_every=3,
        not_averaged=("table",),
        extra={"run": "17"},
    )
    assert read_state(save_params_ema(tmp_path, tx.init(params))).record.schedule is None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.masked(tx, {"layers": True, "table": False, "scale": True, "none": False}),
        lambda tx: optax.partition(
            {"a": tx, "b": params_ema(0.9)},
            {"layers": "a", "table": "b", "scale": "b", "none": "a"},
        ),
    ],
)
def test_the_average_is_found_in_any_optimizer_state(tmp_path, params, wrap):
    del params["phase"]  # MultiSteps casts complex numbers to real ones
    tx = wrap(params_ema(0.9))
    _, state = train(tx, params, tx.init(params), 4, 1)
    save_params_ema(tmp_path, state)
    loaded = load_params_ema(tmp_path, jax.tree.map(jnp.zeros_like, state))
    assert_same(get_params_ema(loaded, params), get_params_ema(state, params))


def test_several_averages_go_to_a_file_each(tmp_path, params):
    tx = params_ema({"short": 0.5, "long": 0.9})
    _, state = train(tx, params, tx.init(params), 3, 1)
    with pytest.raises(ArgumentError, match="`name` must be one of"):
        save_params_ema(tmp_path, state)
    loaded = tx.init(params)
    for name in ("short", "long"):
        save_params_ema(tmp_path / name, state, name)
        loaded = load_params_ema(tmp_path / name, loaded, name)
    assert_same(loaded, state)


def test_the_optimizer_of_nnx(tmp_path):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(1e-3), params_ema(0.9)), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    file = save_params_ema(tmp_path, optimizer.opt_state)
    assert list(read_state(file).tensors) == ["bias", "kernel"]
    before = get_params_ema(optimizer.opt_state)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    optimizer.opt_state = load_params_ema(file, optimizer.opt_state)
    assert_same(get_params_ema(optimizer.opt_state), before)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    assert int(read_state(save_params_ema(tmp_path, optimizer.opt_state)).record.step) == 2


def test_dtypes_and_sharding_are_those_of_the_state(tmp_path):
    mesh = jax.make_mesh((1,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = {"w": jax.device_put(jnp.arange(4.0), sharding), "b": jnp.ones(2)}
    tx = params_ema(0.9)
    state = tx.init(params)
    loaded = load_params_ema(save_params_ema(tmp_path, state), state)
    assert_same(loaded, state)
    assert loaded.params_ema["w"].committed
    assert not loaded.params_ema["b"].committed
    shapes = jax.eval_shape(tx.init, params)
    assert load_params_ema(tmp_path, shapes).params_ema["w"].tolist() == [0, 1, 2, 3]


def test_a_loaded_average_has_memory_of_its_own(tmp_path, edit):
    """Also where the file is aligned in the way that lets JAX use memory as it is."""
    tx = params_ema(0.9)
    state = tx.init({"w": jnp.arange(1024.0)})
    file = save_params_ema(tmp_path, state)

    def align(header):
        text = json.dumps(header).encode()
        return text + b" " * (-(8 + len(text)) % 64)

    edit(file, align)
    loaded = load_params_ema(file, jax.tree.map(jnp.zeros_like, state))
    file.write_bytes(b"\0" * file.stat().st_size)
    assert_same(loaded, state)


def test_a_loaded_state_can_be_donated(tmp_path):
    tx = params_ema(0.5)
    state = tx.init({"w": jnp.arange(1 << 16, dtype=jnp.float32)})
    loaded = load_params_ema(save_params_ema(tmp_path, state), state)
    zeros = {"w": jnp.zeros(1 << 16)}

    @partial(jax.jit, donate_argnums=0)
    def step(state):
        return tx.update(zeros, state, zeros)[1]

    stepped = step(loaded)
    assert loaded.params_ema["w"].is_deleted()
    np.testing.assert_array_equal(stepped.params_ema["w"], np.arange(1 << 16) / 2)


def test_a_count_past_int32_stays_at_its_largest_value(tmp_path):
    tx = params_ema(0.9)
    state = tx.init({"w": jnp.ones(2)})
    file = save_params_ema(tmp_path, state)
    stored = read_state(file)
    sources = {"w": ema.checkpoint.Source("F32", (2,), stored.tensors["w"].bytes)}
    ema.checkpoint.write_state(tmp_path / "b", ema.checkpoint.Record(step=2**40, count=7), sources)
    loaded = load_params_ema(tmp_path / "b", state)
    assert (int(loaded.step), int(loaded.count)) == (2**31 - 1, 7)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": jnp.ones(3), "b": jnp.ones(2)}, r"`w` has shape \(3,\), the file has \(2,\)"),
        ({"w": jnp.ones(2)}, "unexpected: `b`"),
        ({"w": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}, "missing: `c`"),
        ({"w": jnp.ones(2), "b": jnp.arange(2)}, "unexpected: `b`"),
        ({"w": jnp.ones(2, jnp.complex64), "b": jnp.ones(2)}, "`w` has dtype complex64"),
    ],
)
def test_a_file_of_other_params_is_refused(tmp_path, other, message):
    tx = params_ema(0.9)
    file = save_params_ema(tmp_path, tx.init({"w": jnp.ones(2), "b": jnp.ones(2)}))
    with pytest.raises(CheckpointError, match=message) as error:
        load_params_ema(tmp_path, tx.init(other))
    assert str(error.value).startswith(f"{file}: ")


def test_two_leaves_of_one_name_are_refused(tmp_path):
    state = params_ema(0.9).init({"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
    with pytest.raises(ArgumentError, match=r"two averages with the name `a\.b`"):
        save_params_ema(tmp_path, state)


def test_groups_at_different_steps_are_refused(tmp_path):
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    tx = optax.partition({"x": params_ema(0.9), "y": params_ema(0.9)}, {"a": "x", "b": "y"})
    states = tx.init(params).inner_states
    behind = states["y"]._replace(inner_state=states["y"].inner_state._replace(step=jnp.asarray(3)))
    with pytest.raises(
        ArgumentError, match=r"2 groups of one average at different steps: \[0, 3\]"
    ):
        save_params_ema(tmp_path, {**states, "y": behind})


@pytest.mark.parametrize("kind", ["abstract", "traced"])
def test_a_state_without_one_step_is_refused(tmp_path, params, kind):
    state = params_ema(0.9).init(params)
    save = {
        "abstract": lambda: save_params_ema(tmp_path, jax.eval_shape(lambda: state)),
        "traced": lambda: jax.jit(lambda s: save_params_ema(tmp_path, s) and None)(state),
    }[kind]
    with pytest.raises(ArgumentError, match="must hold a number for each of its counters"):
        save()


OPTIONS = [
    {},
    {"compensated": True},
    {"accumulator_dtype": jnp.bfloat16},
    {"on_nonfinite": "skip"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=list(map(str, OPTIONS)))
def test_an_ema_of_nnx_goes_on_from_its_file(tmp_path, options):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    one, other = (EMA(model, 0.99, **options) for _ in range(2))
    for _ in range(3):
        model.kernel[...] = model.kernel[...] * jnp.bfloat16(1.3)
        one.update(model)
    teacher = other.apply_to(model)
    save_params_ema(tmp_path, one.state(), decay=0.99)
    other.set_state(load_params_ema(tmp_path, other.state()))
    model.kernel[...] = model.kernel[...] * jnp.bfloat16(0.4)
    for average in (one, other):
        average.update(model)
    assert_same(nnx.as_pure(nnx.state(other)), nnx.as_pure(nnx.state(one)))
    np.testing.assert_array_equal(teacher.kernel[...], one.params.kernel[...])


def test_a_state_of_another_model_or_of_other_options_is_refused():
    model, other = (nnx.Linear(2, n, rngs=nnx.Rngs(0)) for n in (3, 4))
    average = EMA(model, 0.99)
    before = nnx.to_pure_dict(nnx.state(average))
    with pytest.raises(ModelError, match=r"`kernel` has shape \(2, 3\)"):
        average.set_state(EMA(other, 0.99).state())
    with pytest.raises(ArgumentError, match="must not hold `remainder`"):
        average.set_state(EMA(model, 0.99, compensated=True).state())
    assert_same(nnx.to_pure_dict(nnx.state(average)), before)
