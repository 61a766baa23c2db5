"""Run by ``test_devices.py`` in a process of its own, which has eight devices."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ema
from ema.jax_backend import get_params_ema, load_params_ema, params_ema, save_params_ema
from ema.jax_backend.nnx import use_ema

DECAYS = {"long": ema.HalfLife(steps=50), "short": 0.75}
KINDS = {
    "plain": {},
    "compensated": {"compensated": True},
    "narrow": {"accumulator_dtype": jnp.bfloat16},
}
AXES = [AxisType.Auto, AxisType.Explicit]
SHAPES = {  # a dimension that is split has to be divisible; the others are as they come
    "matrix": ((16, 7), P(("row", "col"), None)),
    "block": ((8, 5, 4), P("row", None, "col")),
    "half": ((3, 24), P(None, "col")),
    "thin": ((8, 1), P(("col", "row"), None)),
    "wave": ((8,), P("col")),
    "bias": ((5,), P()),
    "scale": ((), P()),
}
DTYPES = {"half": jnp.bfloat16, "wave": jnp.complex64}
COLLECTIVE = re.compile(
    r"= (\S+|\(.*?\)) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+|send|recv)"
    r"(?:-start)?\("
)


def mesh_of(devices, axis=AxisType.Auto, *, transposed=False):
    shape = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)}[devices]
    return jax.make_mesh(shape[:: -1 if transposed else 1], ("row", "col"), axis_types=(axis,) * 2)


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(DTYPES.get(name, jnp.float32))
        for name, (shape, _) in SHAPES.items()
    }


def placed(tree, mesh):
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    return jax.device_put(tree, {n: NamedSharding(mesh, SHAPES[n][1]) for n in tree})


def same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        assert int(jnp.sum(np.asarray(a) != np.asarray(b))) == 0


def lies_with(average, params):
    for name, leaf in params.items():
        there = average[name].sharding
        assert there.is_equivalent_to(leaf.sharding, leaf.ndim), f"{name}: {there}"


def collectives(compiled):
    """Type and kind of each: ``("f32[2,4]{1,0}", "all-gather")``."""
    return COLLECTIVE.findall(compiled.as_text())


def size_of(collective):
    """Of the largest array in it."""
    shapes = re.findall(r"\w+\[([\d,]*)\]", collective[0])
    return max(np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes)


def step_of(tx):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def trained(mesh, step, params, state, seeds):
    """Steps with gradients that are given, and no reductions whose order depends on the devices."""
    for seed in seeds:
        params, state = step(params, state, placed(drawn(seed), mesh))
    return params, state


@pytest.fixture(scope="module")
def alone():
    """``alone(kind)``: 200 steps on one device, without a mesh."""
    known = {}

    def run(kind):
        if kind not in known:
            tx = optax.chain(optax.sgd(0.125), params_ema(DECAYS, **KINDS[kind]))
            params = placed(drawn(0), None)
            known[kind] = trained(None, step_of(tx), params, tx.init(params), range(1, 201))
        return known[kind]

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("devices", "axis"), [(1, AXES[0]), (2, AXES[1]), (8, AXES[0])])
def test_two_hundred_steps_have_the_bits_of_one_device(devices, axis, kind, alone):
    mesh = mesh_of(devices, axis)
    tx = optax.chain(optax.sgd(0.125), params_ema(DECAYS, **KINDS[kind]))
    with jax.set_mesh(mesh):
        params = placed(drawn(0), mesh)
        params, state = trained(mesh, step_of(tx), params, tx.init(params), range(1, 201))
    for average in state[-1].averages().values():
        lies_with(average, params)
    same((params, state), alone(kind))


LAYOUTS = {
    "data": ((8,), {"in": P(), "out": P()}),
    "fsdp": ((8,), {"in": P("data", None), "out": P("data", None)}),
    "tensor": ((2, 4), {"in": P("data", "model"), "out": P("model", None)}),
}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_is_averaged_where_it_lies(layout, axis):
    """Data parallel, fully sharded and tensor parallel, with gradients of a batch."""
    shape, specs = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(axis,) * len(shape))
    explicit = axis == AxisType.Explicit

    def loss(params, x):
        if explicit:  # what a compiler does by itself: gather what is split over the batch's axis
            params = {
                n: jax.sharding.reshard(p, P(*(None if a == "data" else a for a in specs[n])))
                for n, p in params.items()
            }
        out = {"out_sharding": P("data", None)} if explicit else {}
        hidden = jnp.tanh(x @ params["in"])
        return jnp.mean(jnp.einsum("bh,ho->bo", hidden, params["out"], **out) ** 2)

    average = params_ema({"a": 0.5, "b": 0.9}, compensated=True, on_nonfinite="skip")
    tx = optax.chain(optax.sgd(0.5, momentum=0.5), average)

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    rng = np.random.default_rng(0)
    start = {"in": rng.normal(size=(8, 16)), "out": rng.normal(size=(16, 8))}
    start = {n: x.astype(np.float32) for n, x in start.items()}
    with jax.set_mesh(mesh):
        params = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in start.items()}
        state, history = tx.init(params), []
        lies_with(state[-1].params_ema["b"], params)
        for _ in range(4):
            x = jax.device_put(rng.normal(size=(16, 8)).astype(np.float32), P("data", None))
            params, state = step(params, state, x)
            history.append(jax.device_get(params))
            for tree in (*state[-1].averages().values(), *state[-1].remainders().values()):
                lies_with(tree, params)
        swapped = get_params_ema(state, params, "a")
        lies_with(swapped, params)
    expected = average.init(jax.tree.map(jnp.asarray, start))
    for seen in history:
        _, expected = jax.jit(average.update)({"in": None, "out": None}, expected, seen)
    same(state[-1], expected)


@pytest.mark.parametrize(("every", "axis"), [(1, AXES[0]), (3, AXES[1])])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_sends_nothing(kind, every, axis):
    """Nor does reading the averages; the guard sends single numbers."""
    mesh = mesh_of(8, axis)
    with jax.set_mesh(mesh):
        params = placed(drawn(0), mesh)
        nothing = jax.tree.map(lambda _: None, params)

        def compiled(**options):
            tx = params_ema(DECAYS, update_every=every, **options)
            update = jax.jit(lambda s, p: tx.update(nothing, s, p)[1], donate_argnums=0)
            read = jax.jit(lambda s, p: get_params_ema(s, p, "long"))
            state = tx.init(params)
            return [f.lower(state, params).compile() for f in (update, read)]

        for program in compiled(**KINDS[kind]):
            assert collectives(program) == []
        guarded, read = compiled(**KINDS[kind], on_nonfinite="skip")
        sent = collectives(guarded)
        assert collectives(read) == []
        total = jax.jit(jnp.sum).lower(params["matrix"]).compile()
    assert collectives(total) == [("f32[]", "all-reduce")]  # what a collective looks like
    # a sum of each parameter that is split, and both its ends on each device where that is not finite
    assert {kind for _, kind in sent} <= {"all-reduce", "all-gather"}
    assert sent
    assert max(map(size_of, sent)) <= 8


def test_the_swap_of_nnx_sends_nothing():
    """Of float32 it puts the very arrays of the average into the model; others it casts in place."""
    mesh = mesh_of(8)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), sharding=("row", "col"))
    for dtype in (jnp.float32, jnp.bfloat16):
        with jax.set_mesh(mesh):
            model = nnx.Linear(
                4, 8, rngs=nnx.Rngs(0), kernel_init=init, use_bias=False, param_dtype=dtype
            )
            tx = optax.chain(optax.sgd(0.1), params_ema(0.9))
            optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
            arguments = nnx.as_pure(optimizer.opt_state), nnx.as_pure(nnx.state(model, nnx.Param))
            assert collectives(jax.jit(get_params_ema).lower(*arguments).compile()) == []
            live = model.kernel.get_value()
            with use_ema(model, optimizer):
                inside = model.kernel.get_value()
                assert inside.sharding.is_equivalent_to(live.sharding, 2)
                if dtype == jnp.float32:
                    assert inside is get_params_ema(optimizer)["kernel"]
            assert model.kernel.get_value() is live


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_on_one_device_is_seen_on_all(value, axis):
    """Wherever it is; and finite numbers whose sum overflows are averaged."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis,))
    tx = params_ema(0.5, on_nonfinite="skip")

    def place(x):
        return {"w": jax.device_put(x, NamedSharding(mesh, P("data")))}

    step = jax.jit(lambda state, params: tx.update({"w": None}, state, params)[1])
    with jax.set_mesh(mesh):
        state = tx.init(place(np.zeros(16, np.float32)))
        for k in range(16):
            live = np.linspace(-3, 3, 16, dtype=np.float32)
            live[k] = value
            state = step(state, place(live))
        assert (int(state.count), int(state.skipped)) == (0, 16)
        largest = np.finfo(np.float32).max * np.where(np.arange(16) < 8, 1, -1)
        state = step(state, place(largest.astype(np.float32)))
    assert (int(state.count), int(state.skipped)) == (1, 16)


def where_on(mesh, array):
    """Where an array is, or the whole of it on every device of a mesh."""
    return array.sharding if array.committed else NamedSharding(mesh, P())


def test_orbax_restores_onto_other_meshes(tmp_path):
    """4 devices, 1, and 8 in another order; going on gives the bits of a run that never stopped."""
    averages = params_ema(DECAYS, compensated=True), params_ema(0.9, name="n", **KINDS["narrow"])
    tx = optax.chain(optax.sgd(0.125), *averages)
    mesh, step = mesh_of(8), step_of(tx)
    params = placed(drawn(0), mesh)
    saved = trained(mesh, step, params, tx.init(params), range(1, 4))
    host = jax.device_get(saved)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", saved)
    onward = jax.device_get(trained(mesh, step, *saved, range(4, 6)))
    for other in (mesh_of(4), mesh_of(1), mesh_of(8, transposed=True)):
        params = placed(drawn(9), other)
        where = jax.tree.map(partial(where_on, other), tx.init(params))
        target = jax.jit(tx.init, out_shardings=where)(params)
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / "saved", (params, target))
        same(restored, host)
        after = trained(other, step, *restored, range(4, 6))
        for state in (restored[1], after[1]):
            for average in (*state[1].averages().values(), state[2].params_ema):
                lies_with(average, params)
        same(after, onward)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_from_one_device_keeps_the_sharding_of_the_state(kind, tmp_path):
    """Its file is that of the sharded state, and abstract arrays say where they are to lie too."""
    tx = params_ema(0.75, **KINDS[kind])
    first = placed(drawn(0), None)
    whole = trained(None, step_of(tx), first, tx.init(first), range(3))[1]
    file = save_params_ema(tmp_path / "one", whole)
    for mesh in (mesh_of(8), mesh_of(2), mesh_of(8, AxisType.Explicit)):
        params = placed(drawn(7), mesh)
        state = tx.init(params)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        for target in (state, shapes):
            loaded = load_params_ema(file, target)
            same(loaded, whole)
            lies_with(loaded.params_ema, params)
            if loaded.remainder:
                lies_with(loaded.remainder, params)
        again = save_params_ema(tmp_path / "many", loaded)
        assert again.read_bytes() == file.read_bytes()
