"""Run by ``test_processes.py``: one of two processes, each with two devices.

What it finds goes to the folder, to be compared with what a process alone computes.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ema
from ema.jax_backend import load_params_ema, params_ema, save_params_ema
from ema.jax_backend.nnx import use_ema

DECAYS = {"long": ema.HalfLife(steps=10), "short": 0.75}
KINDS = {
    "plain": {},
    "precise": {"compensated": True, "on_nonfinite": "skip"},
    "narrow": {"accumulator_dtype": jnp.bfloat16, "on_nonfinite": "skip"},
}
SHAPES = {
    "in": ((8, 10), P("data", "model")),
    "bias": ((10,), P("model")),
    "out": ((10, 3), P("model", None)),
    "half": ((2, 3), P("data", None)),
    "wave": ((4,), P(("data", "model"))),
    "end": ((3,), P()),
    "scale": ((), P()),
}
DTYPES = {"half": jnp.bfloat16, "wave": jnp.complex64}
STEPS = 4
A_DAY = 86_400  # the other process may be as slow as it likes; pytest ends what hangs


def average(kind):
    return params_ema(DECAYS, **KINDS[kind])


def start():
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(DTYPES.get(name, jnp.float32))
        for name, (shape, _) in SHAPES.items()
    }


def here(tree):
    """Whole arrays in this process."""
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def place(mesh, spec, value):
    value = np.asarray(value)
    return jax.make_array_from_callback(
        value.shape, NamedSharding(mesh, spec), lambda index: value[index]
    )


def placed(mesh):
    return {name: place(mesh, SHAPES[name][1], value) for name, value in start().items()}


def same(ours, theirs):
    """The same bits in the same places."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
        for one, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert np.array_equal(np.asarray(one.data), np.asarray(other.data))


def loss(params, x):
    y = jnp.tanh(x @ params["in"] + params["bias"]) @ params["out"] + params["end"]
    y = y * params["scale"] * (1 + jnp.sum(params["half"].astype(jnp.float32), 0))
    return jnp.mean(y**2) + jnp.sum(jnp.abs(params["wave"]) ** 2)


def step_of(tx):
    def step(params, state, x):
        grads = jax.tree.map(jnp.conj, jax.grad(loss)(params, x))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def train(mesh, step, params, state, seeds, seen=None):
    """Real gradients, of a batch that is spread over both processes."""
    for k in seeds:
        x = np.random.default_rng(k).normal(size=(8, 8)).astype(np.float32)
        params, state = step(params, state, place(mesh, P("data"), x))
        if seen is not None:
            seen.append(here(params))
        for tree in state[-1].averages().values():
            for key, leaf in tree.items():
                assert leaf.sharding.is_equivalent_to(params[key].sharding, leaf.ndim), key
    return params, state


def test_training_saving_and_going_on(mesh, folder, kind):
    tx = optax.chain(optax.sgd(0.05), average(kind))
    params, step, seen = placed(mesh), step_of(tx), []
    params, state = train(mesh, step, params, tx.init(params), range(STEPS), seen)
    for name in DECAYS:
        file = save_params_ema(folder / kind / name, state, name)
        assert file.stat().st_size  # also where another process wrote it
    if not jax.process_index():
        flat = {f"{k}/{n}": v for k, tree in enumerate(seen) for n, v in tree.items()}
        wide = {k: v.astype(np.complex64) for k, v in flat.items()}  # holds all of them exactly
        np.savez(folder / kind / "seen.npz", **wide)

    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (params, state)
    )
    zeros = jax.tree.map(lambda x: x * 0, state[-1])
    for target in (zeros, abstract[1][-1]):
        loaded = target
        for name in DECAYS:
            loaded = load_params_ema(folder / kind / name, loaded, name)
        same(loaded, state[-1])

    if kind == "precise":
        restored = through_orbax(folder / kind / "orbax", (params, state), abstract)
        same(restored, (params, state))
        onward = train(mesh, step, *restored, range(2))[1]
        again = train(mesh, step, params, (state[0], loaded), range(2))[1]
        same(onward, again)


def through_orbax(path, tree, abstract):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, abstract)


def test_all_processes_skip_together(mesh):
    """NaN in a part that one process holds."""
    tx = params_ema(0.5, on_nonfinite="skip")
    params = {"w": place(mesh, P("data"), np.array([1.0, 1.0, 1.0, np.nan], np.float32))}
    step = jax.jit(lambda state, params: tx.update({"w": None}, state, params)[1])
    state = step(step(tx.init(params), params), params)
    found = int(state.step), int(state.count), int(state.skipped)
    assert found == (2, 0, 2), found


def test_the_swap_of_nnx(mesh):
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.ones_init(), sharding=("data", "model"))
        model = nnx.Linear(4, 4, rngs=nnx.Rngs(0), kernel_init=init, use_bias=False)
        optimizer = nnx.Optimizer(
            model, optax.chain(optax.sgd(1.0), params_ema(0.5)), wrt=nnx.Param
        )
        ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        nnx.jit(lambda model, optimizer, g: optimizer.update(model, g))(model, optimizer, ones)
        live = model.kernel.get_value()
        with use_ema(model, optimizer):
            averaged = model.kernel.get_value()
            assert averaged.sharding.is_equivalent_to(live.sharding, 2)
            assert {
                float(np.asarray(shard.data).max()) for shard in averaged.addressable_shards
            } == {0.5}
        assert model.kernel.get_value() is live


def test_errors_of_one_are_errors_of_all(mesh, folder):
    state = params_ema(0.5).init(placed(mesh))
    taken = folder / f"taken by {jax.process_index()}"
    taken.write_text("a file")
    with pytest.raises(ema.CheckpointError, match="taken by 0: it is a file"):
        save_params_ema(taken, state)
    other = {"w": place(mesh, P("data"), np.ones(4 + 4 * jax.process_index(), np.float32))}
    with pytest.raises(ema.ModelError, match="the processes hold different arrays"):
        save_params_ema(folder / "other", params_ema(0.5).init(other))
    odd = {"w": place(mesh, P("data"), np.ones(4, np.float16))}
    with pytest.raises(ema.CheckpointError, match="missing: `w`"):
        load_params_ema(save_params_ema(folder / "some", state), params_ema(0.5).init(odd))


def test_what_lies_in_one_process_is_saved_by_it_alone(mesh, folder):
    """And copies on all devices are saved by all together, without being gathered."""
    alone = params_ema(0.5).init({"w": jnp.full(3, float(jax.process_index()))})
    if jax.process_index():
        save_params_ema(folder / "alone", alone)
    multihost_utils.sync_global_devices("saved")
    assert load_params_ema(folder / "alone", alone).params_ema["w"].tolist() == [1, 1, 1]

    copies = params_ema(0.5).init({"w": place(mesh, P(), np.ones(3, np.float32))})
    gather, multihost_utils.process_allgather = multihost_utils.process_allgather, None
    multihost_utils.process_allgather = lambda x, **k: gather(x, **k) if x.size == 2 else 1 / 0
    try:
        save_params_ema(folder / "copies", copies)
    finally:
        multihost_utils.process_allgather = gather
    same(load_params_ema(folder / "copies", jax.tree.map(lambda x: x * 0, copies)), copies)


def main(index, port, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=2,
        process_id=index,
        initialization_timeout=A_DAY,
        heartbeat_timeout_seconds=A_DAY,
        shutdown_timeout_seconds=A_DAY,
    )
    warnings.simplefilter("error", ema.EMAWarning)
    assert (jax.process_count(), len(jax.devices())) == (2, 4)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for kind in KINDS:
        test_training_saving_and_going_on(mesh, folder, kind)
    test_all_processes_skip_together(mesh)
    test_the_swap_of_nnx(mesh)
    test_errors_of_one_are_errors_of_all(mesh, folder)
    test_what_lies_in_one_process_is_saved_by_it_alone(mesh, folder)
    jax.distributed.shutdown()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # an orderly end would wait for the other process
