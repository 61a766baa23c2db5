"""Checkpoints of JAX programs, by Orbax, Flax and NumPy: their averages, and never their raw weights."""

from __future__ import annotations

import io
import pickle
import shutil
import sys
import warnings
import zipfile
from typing import Any

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx, serialization
from flax.training import checkpoints
from flax.training.train_state import TrainState

from ema import ArgumentError, CheckpointError, EMAWarning
from ema.checkpoint import foreign, read_state
from ema.converting import convert, orbax_folders
from ema.jax_backend import params_ema, save_params_ema
from ema.jax_backend.linen import EMATrainState
from ema.jax_backend.nnx import EMA
from tests import processes

RAW, AVERAGE = 1.0, 9.0
DTYPES = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F64": np.float64,
}


def tree(value, dtype=jnp.float32):
    return {
        "dense": {"kernel": jnp.full((2, 3), value, dtype), "bias": jnp.full(3, value, dtype)},
        "norm": {"scale": jnp.full(3, value, jnp.bfloat16)},
    }


NAMES = {"dense.kernel", "dense.bias", "norm.scale"}


def arrays(place):
    return {
        name: np.frombuffer(bytes(tensor.bytes()), DTYPES[tensor.dtype]).reshape(tensor.shape)
        for name, tensor in read_state(place).tensors.items()
    }


@pytest.fixture
def converted(tmp_path):
    """``converted(source, …)``: the record, the arrays, and what the user is told."""

    def run(source, **options):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", EMAWarning)
            result = convert(source, tmp_path / "ours", **{"force": True, **options})
        lines = [*(str(each.message) for each in told), *result.notes]
        return result, arrays(result.place), " ".join(lines)

    return run


@pytest.fixture
def averages(converted):
    """Convert, and compare with what ``tree(AVERAGE)`` holds."""

    def run(source, **options):
        result, found, told = converted(source, **options)
        assert found.keys() == NAMES
        for array in found.values():
            np.testing.assert_array_equal(array.astype(np.float32), AVERAGE)
        return result, told

    return run


def orbax(folder, tree):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def msgpack(file, tree):
    file.write_bytes(serialization.to_bytes(tree))
    return file


def flat_npz(file, tree):
    np.savez(
        file,
        **{
            "/".join(path): leaf if leaf.dtype != jnp.bfloat16 else np.asarray(leaf, np.float32)
            for path, leaf in nnx.traversals.flatten_mapping(
                serialization.to_state_dict(tree)
            ).items()
            if hasattr(leaf, "dtype")
        },
    )
    return file


WRITERS = {"folder": orbax, "file.msgpack": msgpack, "file.npz": flat_npz}
with_each_writer = pytest.mark.parametrize("place", WRITERS)


class WithAverage(TrainState):
    ema_params: Any


class WithTarget(TrainState):
    target_params: Any


# --- train states ---------------------------------------------------------------------------------


@with_each_writer
@pytest.mark.parametrize("field", ["ema_params", "params_ema", "ema", "target_params"])
def test_a_train_state_gives_its_average_and_its_step(tmp_path, averages, place, field):
    state = {
        "step": jnp.int32(5),
        "params": tree(RAW),
        field: tree(AVERAGE),
        "opt_state": optax.adam(1e-3).init(tree(RAW)),
    }
    source = WRITERS[place](tmp_path / place, state)
    key = None
    if field == "target_params":  # which may be a hard copy of raw weights
        key = field
        with pytest.raises(CheckpointError, match=r"`target_params` may be one, or another model"):
            averages(source, decay=0.5)
    result, told = averages(source, decay=0.5, key=key)
    assert (result.record.step, told) == (5, "")
    assert f"`{field}` in " in result.kind


@with_each_writer
@pytest.mark.parametrize("kind", [WithAverage, WithTarget])
def test_a_linen_train_state_with_an_average_of_its_own(tmp_path, averages, place, kind):
    field = {WithAverage: "ema_params", WithTarget: "target_params"}[kind]
    state = kind.create(
        apply_fn=None, params=tree(RAW), tx=optax.adam(1e-3), **{field: tree(AVERAGE)}
    )
    key = field if kind is WithTarget else None
    source = WRITERS[place](tmp_path / place, state.replace(step=3))
    result, _ = averages(source, step=3, key=key)
    assert result.record.step == 3


def without_average():
    params, tx = tree(RAW), optax.adam(1e-3)
    return {
        "train state": TrainState.create(apply_fn=None, params=params, tx=tx),
        "two train states": {
            name: TrainState.create(apply_fn=None, params=params, tx=tx) for name in ("g", "d")
        },
        "variables": {"params": params, "batch_stats": {"mean": jnp.zeros(2)}},
        "params": {"params": params},
        "weights": params,
        "nested": {"model": {"params": params}, "step": jnp.int32(3)},
        "adam": tx.init(params),
        "average of gradients": [optax.ema(0.9).init(params), optax.adam(0.1).init(params)],
        "that beside params": {"params": params, "tx": optax.ema(0.9).init(params)},
        "params and counters": {"params": params, "step": jnp.int32(3), "count": jnp.int32(3)},
        "target of something else": {"params": params, "target_params": {"goal": jnp.ones(2)}},
        "nnx": nnx.to_pure_dict(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))),
    }


@with_each_writer
@pytest.mark.parametrize("kind", without_average())
def test_raw_weights_are_refused_with_what_is_there(tmp_path, converted, place, kind):
    source = WRITERS[place](tmp_path / place, without_average()[kind])
    with pytest.raises(CheckpointError, match=r"nothing in it says .* it holds .*key= \(--key\)"):
        converted(source, step=3)
    assert not (tmp_path / "ours").exists()


@with_each_writer
def test_bare_params_are_taken_at_the_users_word(tmp_path, averages, place):
    source = WRITERS[place](tmp_path / place, {"params": tree(AVERAGE)})
    _, told = averages(source, averaged=True, step=1)
    assert "only you do" in told
    averages(source, key="params", step=1)


@with_each_writer
def test_variables_of_linen_have_the_names_of_their_params(tmp_path, averages, place):
    state = {"params": {"params": tree(RAW)}, "ema_params": {"params": tree(AVERAGE)}}
    averages(WRITERS[place](tmp_path / place, state), step=1)


@pytest.mark.parametrize("place", ["folder", "file.msgpack"])
def test_params_in_lists_are_called_by_their_positions(tmp_path, converted, place):
    layers = [(jnp.full((2, 3), float(k)), jnp.full(3, float(k))) for k in range(11)]
    source = WRITERS[place](tmp_path / place, {"params": layers, "ema": layers})
    _, found, _ = converted(source, step=1)
    assert found.keys() == {f"{k}.{i}" for k in range(11) for i in range(2)}
    np.testing.assert_array_equal(found["10.1"], 10.0)


@with_each_writer
def test_a_key_names_the_part_and_a_wrong_one_is_refused(tmp_path, averages, converted, place):
    state = {"a": {"weights": tree(RAW), "mine": tree(AVERAGE)}, "step": jnp.int32(3)}
    source = WRITERS[place](tmp_path / place, state)
    averages(source, key="a.mine", step=1)
    with pytest.raises(
        CheckpointError, match=r"key= .* must name one of its parts, got 'a\.yours': it holds"
    ):
        converted(source, key="a.yours", step=1)


@with_each_writer
def test_of_several_averages_one_must_be_named(tmp_path, averages, converted, place):
    state = {"params": tree(RAW), "ema": tree(AVERAGE), "ema_slow": tree(RAW)}
    source = WRITERS[place](tmp_path / place, state)
    with pytest.raises(CheckpointError, match="several averages, `ema`, `ema_slow`: pass key="):
        converted(source, step=1)
    averages(source, key="ema", step=1)


# --- states of params_ema -------------------------------------------------------------------------


def updated(tx, params, steps=3):
    state = tx.init(params)
    for k in range(steps):
        grads = jax.tree.map(lambda p, k=k: jnp.full_like(p, 0.1 + k), params)
        _, state = tx.update(grads, state, params)
    return state


@pytest.mark.parametrize("place", ["folder", "file.msgpack"])
@pytest.mark.parametrize("options", [{}, {"compensated": True, "on_nonfinite": "skip"}], ids=str)
def test_the_state_in_a_train_state_gives_the_file_that_it_saves(
    tmp_path, converted, place, options
):
    tx = optax.chain(optax.adam(0.1), params_ema({"short": 0.5, "long": 0.9}, **options))
    params = {"params": tree(RAW)}
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.replace(opt_state=updated(tx, params))
    source = WRITERS[place](tmp_path / place, state)
    result, _, told = converted(source, name="long")
    assert result.record.count == 3
    assert not told
    saved = save_params_ema(tmp_path / "saved", state.opt_state, "long")
    assert result.place.read_bytes() == saved.read_bytes()
    with pytest.raises(ArgumentError, match="`name` must choose one of the averages long, short"):
        converted(source)


@pytest.mark.parametrize("statistics", [False, True])
def test_our_train_state_for_linen(tmp_path, converted, statistics):
    more = {"batch_stats": {"bn": {"mean": jnp.ones(2)}}, "batch_stats_tx": params_ema(0.9)}
    state = EMATrainState.create(
        apply_fn=None,
        params=tree(RAW),
        tx=optax.chain(optax.sgd(0.1), params_ema(0.5)),
        **more if statistics else {},
    )
    state = state.apply_gradients(grads=tree(2.0))
    for place in ("folder", "file.msgpack"):
        result, _, _ = converted(WRITERS[place](tmp_path / place, state))
        saved = save_params_ema(tmp_path / "saved", state)
        assert result.place.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("place", ["folder", "file.msgpack"])
def test_groups_of_one_model_are_one_average_and_two_models_are_two(tmp_path, converted, place):
    """Also where both models have layers of the same names, are masked, and have made equal steps."""
    params = tree(RAW)
    labels = {"dense": {"kernel": "a", "bias": "b"}, "norm": {"scale": "b"}}
    tx = optax.partition({"a": params_ema(0.5), "b": params_ema(0.5)}, labels)
    one, two = updated(tx, params), updated(tx, tree(3.0))
    result, _, _ = converted(WRITERS[place](tmp_path / "one", [optax.EmptyState(), one]))
    saved = save_params_ema(tmp_path / "saved", one)
    assert result.place.read_bytes() == saved.read_bytes()
    group = one.inner_states["a"].inner_state
    later = one.inner_states | {"a": optax.MaskedState(group._replace(step=group.step + 1))}
    source = WRITERS[place](tmp_path / "later", one._replace(inner_states=later))
    with pytest.raises(CheckpointError, match=r"or steps, `inner_states\.a\.inner_state`, "):
        converted(source)
    both = WRITERS[place](tmp_path / "both", {"generator": one, "critic": two})
    with pytest.raises(
        CheckpointError, match=r"or steps, `\w+\.inner_states`, `\w+\.inner_states`: pass key="
    ):
        converted(both)
    converted(both, key="generator")
    assert result.place.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("steps", [(3, 9), (3, 3)])
def test_actor_and_critic_are_told_apart(tmp_path, converted, steps):
    tx = params_ema(0.9)
    actor, critic = (
        updated(tx, {name: jnp.ones(2)}, n)
        for name, n in zip(("actor", "critic"), steps, strict=True)
    )
    source = orbax(tmp_path / "both", {"a": actor, "b": [optax.EmptyState(), critic]})
    with pytest.raises(
        CheckpointError, match=r"several models or steps, `a`, `b\.1`: pass key= \(--key"
    ):
        converted(source)
    assert converted(source, key="b")[0].names == ("critic",)
    result, _, _ = converted(source, key="a")
    assert (result.names, result.record.step) == (("actor",), 3)


def test_an_average_beside_that_of_params_ema_is_asked_for(tmp_path, converted, averages):
    source = orbax(
        tmp_path / "run",
        {"ema_params": tree(AVERAGE), "opt_state": [updated(params_ema(0.9), tree(RAW))]},
    )
    with pytest.raises(CheckpointError, match=r"`ema_params`, `opt_state\.0`: pass key="):
        converted(source)
    averages(source, key="ema_params", step=1)
    assert converted(source, key="opt_state")[0].record.step == 3


def test_members_of_vmap_are_refused(tmp_path, converted):
    tx = params_ema(0.9)
    state = jax.vmap(tx.init)({"w": jnp.ones((4, 2))})
    with pytest.raises(CheckpointError, match=r"`step` must be a count, got int32\[4\]: jax.vmap"):
        converted(orbax(tmp_path / "run", state))


def as_strings(node):
    """Keys as Orbax and msgpack have them."""
    return {str(k): as_strings(v) for k, v in node.items()} if isinstance(node, dict) else node


@pytest.fixture
def optimizer():
    """``optimizer(tx)``: of a model of two layers, after a step."""

    def make(tx):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs))
        made = nnx.Optimizer(model, tx, wrt=nnx.Param)
        made.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
        return made, model

    return make


@pytest.mark.parametrize("form", ["state", "pure", "file.msgpack"])
def test_the_state_of_an_nnx_optimizer(tmp_path, converted, optimizer, form):
    made, _ = optimizer(
        optax.chain(optax.adam(0.1), params_ema(0.5, compensated=True, on_nonfinite="skip"))
    )
    state = nnx.state(made)
    if form == "file.msgpack":
        source = msgpack(tmp_path / form, as_strings(nnx.to_pure_dict(state)))
    else:
        source = orbax(tmp_path / form, nnx.to_pure_dict(state) if form == "pure" else state)
    result, _, _ = converted(source)
    saved = save_params_ema(tmp_path / "saved", made.opt_state)
    assert result.place.read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("pure", [False, True])
def test_an_nnx_state_has_lost_the_names_of_averages(tmp_path, converted, optimizer, pure):
    made, _ = optimizer(optax.chain(optax.sgd(0.1), params_ema({"short": 0.5, "long": 0.9})))
    state = nnx.state(made)
    source = orbax(tmp_path / "run", nnx.to_pure_dict(state) if pure else state)
    with pytest.raises(ArgumentError, match=r"`long`, `short`, .*key='opt_state\.1\.params_ema'"):
        converted(source)
    result, _, _ = converted(source, name="long")
    saved = save_params_ema(tmp_path / "saved", made.opt_state, "long")
    assert result.place.read_bytes() == saved.read_bytes()
    assert "long.layers.0.kernel" in converted(source, key="opt_state.1.params_ema")[0].names


def test_boxed_linen_params_have_the_names_of_plain_ones(tmp_path, averages):
    boxed = tree(AVERAGE)
    boxed["dense"]["kernel"] = linen.Partitioned(boxed["dense"]["kernel"], ("x", "y"))
    for place in ("folder", "file.msgpack"):
        state = {"params": tree(RAW), "ema_params": boxed}
        averages(WRITERS[place](tmp_path / place, state), step=1)


@pytest.mark.parametrize("pure", [False, True])
def test_nnx_averages_without_marks_need_the_users_word(tmp_path, converted, pure):
    """``nnx.EMA`` is params alone, and so is our ``EMA`` with two counters."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    for number, average in enumerate((nnx.EMA(model, decay=0.9), EMA(model, 0.9))):
        average.update(model)
        state = nnx.state(average)
        source = orbax(tmp_path / str(number), nnx.to_pure_dict(state) if pure else state)
        with pytest.raises(CheckpointError, match=r"averaged=True \(--averaged\)"):
            converted(source)
        result, found, _ = converted(source, averaged=True, step=None if number else 1)
        assert (found.keys(), result.record.step) == ({"bias", "kernel"}, 1)


@pytest.mark.parametrize("options", [{}, {"compensated": True, "on_nonfinite": "skip"}], ids=str)
def test_an_average_of_nnx_beside_its_model(tmp_path, converted, options):
    """Under a name that says so, or that ``key`` names; ours with its counters and remainder."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    theirs, ours = nnx.EMA(model, decay=0.9), EMA(model, 0.9, **options)
    model.kernel[...] = model.kernel[...] * jnp.bfloat16(1.7)
    for average in (theirs, ours):
        average.update(model)
    saved = save_params_ema(tmp_path / "saved", ours.state())
    for name, key in (("ema", None), ("mine", "mine")):
        state = {"model": nnx.state(model), name: nnx.state(ours)}
        result, _, _ = converted(orbax(tmp_path / f"ours-{name}", state), key=key)
        assert result.place.read_bytes() == saved.read_bytes()
        state = {"model": nnx.state(model), name: nnx.state(theirs)}
        _, found, _ = converted(orbax(tmp_path / f"theirs-{name}", state), step=1, key=key)
        np.testing.assert_array_equal(found["kernel"], theirs.params["kernel"][...])
        assert found.keys() == {"kernel", "bias"}


# --- folders of Orbax and Flax --------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """The folder of a run of three steps."""
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (3, 20, 7):
            state = {"params": tree(RAW), "ema": tree(AVERAGE), "step": jnp.int32(step)}
            manager.save(step, args=ocp.args.StandardSave(state), force=True)
        manager.wait_until_finished()
    return tmp_path / "run"


def test_a_run_a_step_and_an_item(run, averages):
    """The converter takes the latest step of a run, and says so."""
    shutil.copytree(run / "7", run / "30.orbax-checkpoint-tmp-123456")
    result, told = averages(run)
    assert result.record.step == 20
    assert "`20` is taken, the latest step; name the folder of another one" in told
    for place in ("7", "7/default"):
        result, told = averages(run / place)
        assert (result.record.step, told) == (7, "")


def test_a_save_that_is_not_finished_is_refused(run, converted):
    with pytest.raises(CheckpointError, match="Orbax has not finished this save"):
        converted((run / "7").rename(run / "7.orbax-checkpoint-tmp"))


def test_the_items_of_a_step_are_told_by_their_names(tmp_path, averages, converted):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        items = {
            "params": ocp.args.StandardSave(tree(RAW)),
            "ema": ocp.args.StandardSave(tree(AVERAGE)),
            "notes": ocp.args.JsonSave({"a": 1}),
        }
        manager.save(7, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
    for place in ("run", "run/7", "run/7/ema"):
        averages(tmp_path / place, step=1)
    with pytest.raises(CheckpointError, match=r"nothing in it says .* `params` \(3 tensors\)"):
        converted(tmp_path / "run/7/params", step=1)
    averages(tmp_path / "run/7", key="ema", step=1)


@pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated")
@pytest.mark.parametrize("writer", ["orbax", "msgpack"])
def test_checkpoints_of_flax_training(tmp_path, averages, writer):
    with flax.config.temp_flip_flag("use_orbax_checkpointing", writer == "orbax"):
        for step in (5, 10):
            state = {"params": tree(RAW), "ema_params": tree(AVERAGE), "step": step}
            checkpoints.save_checkpoint(tmp_path / "run", state, step, keep=2)
    assert (tmp_path / "run/checkpoint_10").is_dir() == (writer == "orbax")
    result, told = averages(tmp_path / "run")
    assert result.record.step == 10
    assert "`checkpoint_10` is taken" in told
    assert averages(tmp_path / "run/checkpoint_5")[0].record.step == 5


@pytest.mark.parametrize("options", [{"use_ocdbt": False}, {"use_ocdbt": True, "use_zarr3": True}])
def test_other_ways_in_which_orbax_writes(tmp_path, averages, options):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        state = {"params": tree(RAW), "ema": tree(AVERAGE), "note": "a", "none": None}
        checkpointer.save(tmp_path / "run", args=ocp.args.PyTreeSave(state))
    averages(tmp_path / "run", step=1)


def test_float8_and_integers(tmp_path, converted):
    """Kept or listed, never left out in silence."""
    average = {"w": jnp.full(4, 1.5, jnp.float8_e4m3fn), "k": jnp.full(4, 2.5), "n": jnp.arange(3)}
    for place in ("folder", "file.msgpack"):
        source = WRITERS[place](tmp_path / place, {"ema": average, "params": average})
        result, found, _ = converted(source, step=1)
        assert {"w", "k"} <= {*found, *result.left_out}
        assert result.record.not_averaged == ("n",)
    odd = {"ema": {"w": jnp.ones(4, jnp.float8_e4m3b11fnuz), "k": jnp.ones(4)}}
    with pytest.raises(CheckpointError, match="`w` is an array of dtype float8_e4m3b11fnuz, which"):
        converted(orbax(tmp_path / "odd", odd), step=1)


def test_a_damaged_orbax_folder_is_refused(tmp_path, converted):
    """Its tensors, or its metadata."""
    # of several arrays each would fail, some of them after Orbax has closed its event loop
    source = orbax(tmp_path / "run", {"ema": {"w": jnp.ones(3)}})
    for file in sorted((source / "ocdbt.process_0/d").iterdir()) + sorted((source / "d").iterdir()):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(CheckpointError, match=r"run: Orbax cannot read it: ValueError: "):
        converted(source, step=1)
    (source / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="run: Orbax cannot read it: JSONDecodeError: "):
        converted(source, step=1)


@pytest.mark.parametrize("batch", [0, 36, 1000])
@pytest.mark.parametrize("rename", [None, {"dense.bias": "z"}])
def test_each_array_of_the_average_is_restored_once(tmp_path, monkeypatch, batch, rename):
    """Whatever fits in a batch, and in whichever order they are written."""
    restored = []
    restore = orbax_folders._Item._restore

    def recorded(item, indices):
        restored.extend(indices)
        return restore(item, indices)

    monkeypatch.setattr(orbax_folders, "_BATCH", batch)
    monkeypatch.setattr(orbax_folders._Item, "_restore", recorded)
    state = optax.chain(optax.adam(0.1), params_ema(0.5)).init(tree(RAW))
    convert(orbax(tmp_path / "run", state), tmp_path / "ours", rename=rename)
    assert len(restored) == len(set(restored)) == 3 + len(NAMES)  # and the counters
    saved = save_params_ema(tmp_path / "saved", state)
    named = {(rename or {}).get(name, name): array for name, array in arrays(saved).items()}
    for name, array in arrays(tmp_path / "ours").items():
        np.testing.assert_array_equal(array, named[name])


MEMORY = """
import sys

import ema, jax, orbax.checkpoint, tensorstore

def peak():
    line, = [l for l in open("/proc/self/status") if l.startswith("VmHWM")]
    return int(line.split()[1])

before = peak()
ema.convert(sys.argv[1], sys.argv[2], decay=0.5)
print(peak() - before)
"""


def test_only_the_average_is_read_from_disk(tmp_path):
    """At most 1.5 times its 80 MB, and 100 MiB, out of a tree of five times as much."""
    params = {f"w{i}": jax.random.normal(jax.random.key(i), (10_000, 200)) for i in range(10)}
    state = optax.chain(optax.adam(0.1), params_ema(0.5)).init(params)
    orbax(tmp_path / "run", {"params": params, "more": params, "opt_state": state})
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "run"), str(tmp_path / "ours")]
    done = processes.run(command)
    assert int(done.stdout) << 10 <= 1.5 * 80_000_000 + (100 << 20)
    np.testing.assert_array_equal(arrays(tmp_path / "ours")["w7"], params["w7"])


def refusal(converted, file):
    """The text of the error, if there is one."""
    try:
        converted(file, step=1)
    except CheckpointError as error:
        return str(error)
    return None


# --- msgpack --------------------------------------------------------------------------------------


def test_arrays_in_chunks(tmp_path, converted, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    average = {"w": jnp.arange(60.0).reshape(3, 20), "b": jnp.arange(50, dtype=jnp.bfloat16)}
    source = msgpack(tmp_path / "x.msgpack", {"params": {"w": 0}, "ema_params": average})
    assert b"__msgpack_chunked_array__" in source.read_bytes()
    _, found, _ = converted(source, step=1)
    for name, array in average.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_damaged_msgpack_file_is_refused(tmp_path, converted):
    """Cut anywhere, or with any byte changed: one error, or other values of the same arrays."""
    whole = serialization.to_bytes({"ema": {"w": jnp.ones((2, 3))}, "params": {"w": jnp.ones(2)}})
    file = tmp_path / "x.msgpack"
    for end in range(2, len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"x\.msgpack: "):
            converted(file, step=1)
    for place in range(1, len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            refused = refusal(converted, file)
            assert refused is None or "x.msgpack: " in refused


def test_msgpack_that_is_deep_or_says_to_be_large_is_refused(tmp_path, converted):
    for text, reason in {
        b"\x81\xa1a" * 70 + b"\xc0": "nested more than 64 levels deep",
        b"\x81\xa1a" * 5000 + b"\xc0": "StackError",
        b"\xdf\xff\xff\xff\xff\xa1a\xc0": "4294967295 exceeds max_map_len",
        b"\x81\xa3ema\xc9\xff\xff\xff\xff\x01abc": "exceeds max_ext_len",
        b"\x82\xa1a\xc0\xa1a\xc0": "keys must be different strings",
        b"\x81\xa1a\xc0\xc0": "extra data",
        b"\x81\xa1a\xc1": "FormatError",
    }.items():
        (tmp_path / "x.msgpack").write_bytes(text)
        with pytest.raises(CheckpointError, match=f"begins like a msgpack file.*{reason}"):
            converted(tmp_path / "x.msgpack")


def test_flax_is_not_needed_for_msgpack(tmp_path):
    msgpack(tmp_path / "x.msgpack", {"params": tree(RAW), "ema": tree(AVERAGE)})
    code = (
        "import sys, ema; ema.convert(sys.argv[1], sys.argv[2], step=1)\n"
        "assert not {'jax', 'flax', 'torch', 'ml_dtypes'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.msgpack"), str(tmp_path / "ours")]
    processes.run(command)
    assert arrays(tmp_path / "ours").keys() == NAMES


# --- npz ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("separator", ["/", "."])
def test_archives_of_numpy(tmp_path, converted, save, separator):
    average = {
        "a/kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3),
        "a/bias": np.arange(3.0).astype(">f8"),
        "b/kernel": np.asfortranarray(np.arange(8.0, dtype=np.float32).reshape(4, 2)),
        "b/narrow": np.arange(4).astype(ml_dtypes.bfloat16),
    }
    save(
        tmp_path / "x.npz",
        **{
            name.replace("/", separator): array
            for part, scale in (("params", -1), ("ema_params", 1))
            for name, array in (
                (f"{part}/{n}", array * array.dtype.type(scale)) for n, array in average.items()
            )
        },
        step=7,
    )
    result, found, _ = converted(tmp_path / "x.npz")
    assert result.record.step == 7
    assert found.keys() == {name.replace("/", ".") for name in average}
    for name, array in average.items():
        np.testing.assert_array_equal(found[name.replace("/", ".")], array)


def test_weights_of_big_vision_need_a_word(tmp_path, converted):
    names = ["params/img/kernel", "params/t", "opt/0/mu/img/kernel", "opt/0/mu/t", "extra/n"]
    np.savez(tmp_path / "x.npz", **{name: np.ones(3, np.float32) for name in names})
    with pytest.raises(CheckpointError, match=r"nothing in it says .*`params` \(2 tensors"):
        converted(tmp_path / "x.npz", step=1)
    assert converted(tmp_path / "x.npz", key="params", step=1)[1].keys() == {"img.kernel", "t"}


def test_arrays_without_names_get_those_that_are_given(tmp_path, converted):
    arrays = [np.full(i + 1, i, np.float32) for i in range(12)]
    np.savez(tmp_path / "x.npz", *arrays)
    with pytest.raises(ArgumentError, match=r"`names` must be given, .* a list of 12 tensors"):
        converted(tmp_path / "x.npz", averaged=True, step=1)
    names = [f"layer{i}" for i in range(12)]
    _, found, _ = converted(tmp_path / "x.npz", averaged=True, step=1, names=names)
    np.testing.assert_array_equal(found["layer10"], arrays[10])


def test_a_small_archive_of_large_arrays_is_bounded(tmp_path, converted):
    """2 GiB of zeros in 2 MB are not read; an ordinary archive of zeros is."""
    file = tmp_path / "x.npz"
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 29,)}
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("ema/w.npy", "w", force_zip64=True) as stream,
    ):
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(bytes(1 << 20))
    with pytest.raises(CheckpointError, match=r"declare averages of 2147483648 bytes .*max_bytes="):
        converted(file, step=1)
    with pytest.raises(CheckpointError, match="shorter or longer than it declares"):
        converted(file, step=1, max_bytes=1 << 32)
    with zipfile.ZipFile(file, "w") as archive, archive.open("ema/w.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {**header, "shape": (3,)})
        stream.write(bytes(16))
    with pytest.raises(CheckpointError, match="shorter or longer than it declares"):
        converted(file, step=1)
    np.savez_compressed(file, **{"ema/w": np.zeros(10_000_000, np.float32)})
    assert file.stat().st_size < 50_000
    assert converted(file, step=1)[1]["w"].shape == (10_000_000,)
    with pytest.raises(CheckpointError, match="max_bytes="):
        converted(file, step=1, max_bytes=1000)


def test_an_orbax_folder_of_zeros_is_bounded(tmp_path, converted):
    """Like any compressed source."""
    source = orbax(tmp_path / "run", {"ema": {"w": jnp.zeros(1_000_000)}})
    with pytest.raises(CheckpointError, match=r"declare averages of 4000000 bytes .*max_bytes="):
        converted(source, step=1, max_bytes=1_000_000)
    assert converted(source, step=1)[1]["w"].shape == (1_000_000,)


def test_files_that_begin_alike_are_not_taken_for_msgpack():
    assert not foreign.begins_like_msgpack(b"\x89HDF\r\n\x1a\n\0")
    assert not foreign.begins_like_msgpack(b"\x89PNG\r\n\x1a\n\0")
    assert not foreign.begins_like_msgpack(pickle.dumps({"a": 1})[:9])


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_an_archive_runs_nothing(tmp_path, converted, capsys):
    np.savez(
        tmp_path / "x.npz",
        **{"ema/w": np.ones(2), "ema/o": np.array([Malicious()]), "params/w": np.ones(2)},
    )
    with pytest.raises(CheckpointError, match="`o` is an array of objects, which only unpickling"):
        converted(tmp_path / "x.npz", step=1)
    assert "executed" not in capsys.readouterr().out


def test_other_archives_of_arrays_are_refused(tmp_path, converted):
    file = tmp_path / "x.npz"
    array = io.BytesIO()
    np.save(array, np.ones(3))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("ema/w.npy", array.getvalue())
    with pytest.raises(
        CheckpointError, match=r"`ema/w` is compressed in a way that np\.savez does not"
    ):
        converted(file, step=1)
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for value in (1.0, 9.0):
            with archive.open("ema/w.npy", "w") as stream:
                np.lib.format.write_array(stream, np.full(3, value))
    with pytest.raises(CheckpointError, match="holds two arrays that are called `ema/w`"):
        converted(file, step=1)
    np.savez(file, **{"ema/w": np.ones(3, ml_dtypes.float8_e4m3fn)})
    with pytest.raises(
        CheckpointError, match=r"`w` is an array of 1 raw bytes per element: np\.savez"
    ):
        converted(file, step=1)


def test_a_damaged_archive_is_refused(tmp_path, converted):
    """Cut anywhere, or with any byte changed: one error, or other values of the same arrays."""
    file = tmp_path / "x.npz"
    np.savez_compressed(file, **{"ema/w": np.arange(3.0), "params/w": np.ones(3)})
    whole = file.read_bytes()
    for place in range(4, len(whole), 3):
        for data in (
            whole[:place],
            whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :],
        ):
            file.write_bytes(data)
            refused = refusal(converted, file)
            if refused is None:
                np.testing.assert_array_equal(arrays(tmp_path / "ours")["w"], np.arange(3.0))
            else:
                assert "x.npz: " in refused
