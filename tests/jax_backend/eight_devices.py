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


def chain(every=1):
    return optax.chain(optax.sgd(0.125), params_ema(DECAYS, update_every=every))


def reference(every, steps=5):
    params, tx = tree(), chain(every)
    state, step = tx.init(params), jax.jit(step_of(tx))
    for k in range(steps):
        params, state = step(params, state, jnp.float32(k))
    return params, state


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("jit_init", [False, True])
def test_the_average_lies_where_the_parameters_lie(axis, every, jit_init):
    """From init on, through donated steps, with the bits of one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis,))
    tx = chain(every)
    with jax.set_mesh(mesh):
        params = placed(mesh)
        state = (jax.jit(tx.init) if jit_init else tx.init)(params)
        step = jax.jit(step_of(tx), donate_argnums=(0, 1))
        for k in range(6):
            for average in state[-1].averages().values():
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
    expected_params, expected = reference(every)
    for name in DECAYS:
        jax.tree.map(
            np.testing.assert_array_equal,
            get_params_ema(state, name=name),
            get_params_ema(expected, name=name),
        )
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)


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
