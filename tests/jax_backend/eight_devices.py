"""Run by ``test_devices.py`` in a process of its own, which has eight devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ema
from ema.jax_backend import get_params_ema, params_ema

DECAYS = {"short": 0.9, "long": ema.HalfLife(steps=10)}
SPECS = {"w": P("data", None), "half": P(None, "data"), "bias": P()}


def tree():
    rng = np.random.default_rng(1)
    return {
        "w": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
        "half": jnp.asarray(rng.normal(size=(4, 8)), jnp.bfloat16),
        "bias": jnp.zeros(4, jnp.float32),
    }


def placed(mesh, specs=SPECS):
    return jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), tree(), specs)


def step_of(tx):
    def step(params, state, x):
        # given and not computed: no reduction whose order depends on the devices
        grads = jax.tree.map(lambda p: jnp.ones_like(p) * x.astype(p.dtype), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


OPTIONS = {
    "plain": {},
    "precise": {"compensated": True, "on_nonfinite": "skip"},
    "narrow": {"accumulator_dtype": jnp.bfloat16, "on_nonfinite": "skip"},
}


def chain(every=1, **options):
    return optax.chain(optax.sgd(0.125), params_ema(DECAYS, update_every=every, **options))


def reference(every, steps=5, **options):
    params, tx = tree(), chain(every, **options)
    state, step = tx.init(params), jax.jit(step_of(tx))
    for k in range(steps):
        params, state = step(params, state, jnp.float32(k))
    return params, state


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("jit_init", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
def test_the_average_lies_where_the_parameters_lie(kind, axis, every, jit_init):
    """From init on, through donated steps, with the bits of one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis,))
    tx = chain(every, **OPTIONS[kind])
    with jax.set_mesh(mesh):
        params = placed(mesh)
        state = (jax.jit(tx.init) if jit_init else tx.init)(params)
        step = jax.jit(step_of(tx), donate_argnums=(0, 1))
        for k in range(6):
            trees = list(state[-1].averages().values())
            if kind == "precise":
                trees += state[-1].remainders().values()
            for average in trees:
                for name, spec in SPECS.items():
                    there = average[name].sharding
                    assert there.is_equivalent_to(
                        NamedSharding(mesh, spec), 2 - (name == "bias")
                    ), f"{name} at step {k}: {there}"
            if k < 5:
                params, state = step(params, state, jnp.float32(k))
        read = get_params_ema(state, params, "long")
        assert all(
            read[n].sharding.is_equivalent_to(params[n].sharding, params[n].ndim) for n in SPECS
        )
    expected_params, expected = reference(every, **OPTIONS[kind])
    jax.tree.map(np.testing.assert_array_equal, state[-1], expected[-1])
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_random_bits_are_those_of_the_whole_array(devices, axis):
    """Whatever is sharded over whichever axes; nothing is sent and nothing of its size is held."""
    shape = (devices // 2, 2) if devices > 1 else (1, 1)
    mesh = jax.make_mesh(shape, ("row", "col"), axis_types=(axis,) * 2)
    rng = np.random.default_rng(0)
    sizes = {"w": (512, 64, 8), "v": (4096,)}
    whole = {n: jnp.asarray(rng.normal(size=size), jnp.float32) for n, size in sizes.items()}
    specs = {"w": P("col", None, "row"), "v": P(("row", "col"))}
    tx = params_ema(0.99, accumulator_dtype=jnp.bfloat16)
    zeros = jax.tree.map(jnp.zeros_like, whole)
    start = tx.init(jax.tree.map(lambda p: p + 1, whole))
    _, expected = jax.jit(tx.update)(zeros, start, whole)
    with jax.set_mesh(mesh):
        place = lambda t: jax.tree.map(  # noqa: E731
            lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), t, specs
        )
        state = start._replace(params_ema=place(start.params_ema))
        arguments = place(zeros), state, place(whole)
        program = jax.jit(lambda *a: tx.update(*a)[1], donate_argnums=1)
        compiled = program.lower(*arguments).compile()
        state = program(*arguments)
    jax.tree.map(np.testing.assert_array_equal, state.params_ema, expected.params_ema)
    text = compiled.as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "collective-permute"))
    assert compiled.memory_analysis().temp_size_in_bytes < 4096


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_all_devices_skip_together(every, checked):
    """In ``shard_map``, where one device alone sees the NaN."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = params_ema(DECAYS, update_every=every, on_nonfinite="skip", compensated=True)
    params = placed(mesh)
    state = tx.init(params)
    specs = jax.tree.map(lambda x: x.sharding.spec, params)
    state_specs = optax.tree.map_params(
        tx, lambda _, s: s, state, specs, transform_non_params=lambda _: P()
    )
    step = jax.jit(
        jax.shard_map(
            lambda p, s: tx.update(jax.tree.map(jnp.zeros_like, p), s, p)[1],
            mesh=mesh,
            in_specs=(specs, state_specs),
            out_specs=state_specs,
            check_vma=checked,
        )
    )
    before = state
    bad = {**params, "w": params["w"].at[6, 2].set(jnp.nan)}
    for live in [bad] * every + [params] * every:
        state = step(live, state)
    for counter, value in (("skipped", 1), ("count", 1), ("step", 2 * every)):
        shards = getattr(state, counter).addressable_shards
        assert [int(shard.data) for shard in shards] == [value] * 8
    for _ in range(every):
        before = step(params, before)
    jax.tree.map(np.testing.assert_array_equal, state.params_ema, before.params_ema)


def test_chance_in_a_shard_map():
    """Of a whole array it is what it is elsewhere; a part of one is refused."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = params_ema(0.9, accumulator_dtype=jnp.bfloat16)
    params = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8)}
    state = tx.init(params)._replace(params_ema={"w": jnp.zeros((8, 8), jnp.bfloat16)})
    zeros = {"w": jnp.zeros((8, 8))}

    def step(spec):
        whole = jax.tree.map(lambda _: P(), state)._replace(params_ema={"w": spec})
        return jax.shard_map(
            lambda u, s, p: tx.update(u, s, p)[1],
            mesh=mesh,
            in_specs=({"w": spec}, whole, {"w": spec}),
            out_specs=whole,
        )

    _, expected = jax.jit(tx.update)(zeros, state, params)
    after = jax.jit(step(P()))(zeros, state, params)
    jax.tree.map(np.testing.assert_array_equal, after, expected)
    with pytest.raises(ema.StateError, match=r"inside jax.shard_map .* over 'data'.*in jax.jit"):
        jax.jit(step(P("data")))(zeros, state, params)


def test_explicit_types_show_in_the_abstract_state():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(params_ema(0.9).init, placed(mesh))
    assert state.params_ema["w"].sharding.spec == P("data", None)
    assert state.params_ema["half"].sharding.spec == P(None, "data")


@pytest.mark.parametrize("every", [1, 2])
def test_shard_map(every):
    """Each device averages its own shard; nothing is communicated."""
    mesh = jax.make_mesh((8,), ("data",))
    tx = chain(every)
    params = placed(mesh)
    state = tx.init(params)
    specs = jax.tree.map(lambda x: x.sharding.spec, params)
    state_specs = optax.tree.map_params(
        tx, lambda _, s: s, state, specs, transform_non_params=lambda _: P()
    )
    step = jax.jit(
        jax.shard_map(
            step_of(tx),
            mesh=mesh,
            in_specs=(specs, state_specs, P()),
            out_specs=(specs, state_specs),
        )
    )
    for k in range(5):
        params, state = step(params, state, jnp.float32(k))
    _, expected = reference(every)
    jax.tree.map(np.testing.assert_array_equal, state[-1].params_ema, expected[-1].params_ema)
    text = step.lower(params, state, jnp.float32(0)).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "collective-permute"))


def test_data_parallel_jit():
    """Batch over eight devices, parameters everywhere: the average is everywhere and the same."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, P())
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    params = jax.device_put({"w": jnp.ones((8, 4)), "b": jnp.zeros(4)}, everywhere)
    tx = optax.chain(optax.adamw(0.1), params_ema(0.5))
    state = jax.jit(tx.init, out_shardings=everywhere)(params)

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(lambda p: jnp.mean((x @ p["w"] + p["b"]) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    expected = params
    for k in range(3):
        batch = jax.device_put(x + np.float32(k), NamedSharding(mesh, P("data")))
        with jax.numpy_dtype_promotion("standard"):  # optax's adamw mixes dtypes itself
            params, state = step(params, state, batch)
        expected = jax.tree.map(lambda a, p: (a + p) / 2, expected, params)
    for name, leaf in state[-1].params_ema.items():
        assert leaf.sharding.is_fully_replicated
        assert len({np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}) == 1
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-6)


def test_nnx_keeps_sharding_and_metadata():
    """The test that flax has of ``nnx.EMA``, with bfloat16 parameters too."""
    from ema.jax_backend.nnx import EMA

    mesh = jax.make_mesh((2, 4), ("row", "col"), axis_types=(AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), sharding=("row", "col"))
    for dtype in (jnp.float32, jnp.bfloat16):
        with jax.set_mesh(mesh):
            model = nnx.Linear(
                4, 8, rngs=nnx.Rngs(0), kernel_init=init, use_bias=False, param_dtype=dtype
            )
            average = EMA(model, decay=0.9)
            step = nnx.jit(lambda average, model: average.update(model), donate_argnums=0)
            for _ in range(2):
                theirs = average.params.kernel
                assert theirs.sharding.is_equivalent_to(model.kernel.sharding, 2)
                assert theirs.get_metadata() == model.kernel.get_metadata()
                (wide,) = [a for a in jax.tree.leaves(average) if a.shape == (4, 8)][-1:]
                assert wide.sharding.is_equivalent_to(model.kernel.sharding, 2)
                step(average, model)
