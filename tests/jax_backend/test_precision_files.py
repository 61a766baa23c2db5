"""What is beside an average, in ``ema.safetensors``: remainder, skipped updates, seed."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ema
from ema.checkpoint import read_state
from ema.jax_backend import load_params_ema, params_ema, save_params_ema

OPTIONS = {
    "compensated": {"compensated": True},
    "guarded": {"on_nonfinite": "skip"},
    "both": {"compensated": True, "on_nonfinite": "skip"},
    "narrow": {"accumulator_dtype": jnp.bfloat16, "on_nonfinite": "skip", "seed": 3},
}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def params(params):
    return {**params, "n": jnp.int32(1), "z": jnp.ones(2, jnp.complex64)}


@pytest.fixture
def after(params):
    """``after(tx, steps)``: the state after some steps of which the second holds a NaN."""

    def run(tx, steps, state=None):
        state = tx.init(params) if state is None else state
        zeros = jax.tree.map(jnp.zeros_like, params)
        for k in range(steps):
            live = jax.tree.map(lambda p, k=k: p * jnp.asarray(k + 0.7).astype(p.dtype), params)
            if k == 1:
                live["bias"] = live["bias"].at[0].set(jnp.nan)
            _, state = jax.jit(tx.update)(zeros, state, live)
        return state

    return run


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_resumed_run_has_every_bit(kind, several, after, tmp_path):
    decay = {"a": 0.999, "b": 0.9} if several else 0.999
    tx = params_ema(decay, **OPTIONS[kind])
    steps = 4 if kind != "compensated" else 1
    state = after(tx, steps)
    resumed = after(tx, 0)
    for name in ("a", "b") if several else (None,):
        save_params_ema(tmp_path / str(name), state, name)
        resumed = load_params_ema(tmp_path / str(name), resumed, name)
    equal(resumed, state)
    equal(after(tx, 1, resumed), after(tx, 1, state))


def test_the_file_has_parts_where_there_are_some(after, tmp_path):
    tx = params_ema(0.9, compensated=True, on_nonfinite="skip")
    stored = read_state(save_params_ema(tmp_path, after(tx, 3), seed=2**63))
    names = ["bias", "dense.kernel", "z"]
    assert sorted(stored.tensors) == sorted([*names, *(f"remainder/{n}" for n in names)])
    assert stored.record.parts == {f"remainder/{n}": ("", "remainder", n) for n in names}
    assert (stored.record.skipped, stored.record.seed) == (1, 2**63)
    assert stored.record.not_averaged == ("n",)
    plain = read_state(save_params_ema(tmp_path, after(params_ema(0.9), 1))).record
    assert (plain.parts, plain.skipped, plain.seed) == ({}, None, None)


def test_a_remainder_is_dropped_with_a_warning_and_begun_in_silence(after, tmp_path):
    precise = params_ema(0.9, compensated=True, on_nonfinite="skip")
    plain = params_ema(0.9)
    state = after(precise, 3)
    save_params_ema(tmp_path / "with", state)
    with pytest.warns(
        ema.EMAWarning, match=r"compensated.* the remainder of `bias`, `dense.kernel`, `z`"
    ):
        loaded = load_params_ema(tmp_path / "with", after(plain, 0))
    equal(loaded, state._replace(remainder=(), skipped=()))
    save_params_ema(tmp_path / "without", loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_params_ema(tmp_path / "without", state)
    zeros = jax.tree.map(jnp.zeros_like, state.remainder)
    equal(again, state._replace(remainder=zeros, skipped=jnp.int32(0)))


def test_renamed_and_transposed_with_its_average(after, tmp_path, params):
    tx = params_ema(0.999, compensated=True)
    save_params_ema(tmp_path, after(tx, 1))
    other = {**params, "out": {"kernel": params["dense"]["kernel"]}}
    del other["dense"]
    loaded = load_params_ema(
        tmp_path,
        tx.init(other),
        rename={"dense.kernel": "out.kernel"},
        transform={"out.kernel": lambda a: a.T},
    )
    expected = after(tx, 1)
    for field in ("params_ema", "remainder"):
        ours, theirs = getattr(loaded, field)["out"], getattr(expected, field)["dense"]
        np.testing.assert_array_equal(ours["kernel"], theirs["kernel"].T)
        assert np.any(ours["kernel"])


def test_in_groups_and_in_an_nnx_optimizer(tmp_path, params):
    del params["n"]
    tx = params_ema(0.999, compensated=True)
    groups = optax.partition({0: tx, 1: tx}, {"dense": 0, "bias": 1, "z": 1})
    zeros = jax.tree.map(jnp.zeros_like, params)
    live = jax.tree.map(lambda p: p * jnp.asarray(0.3).astype(p.dtype), params)
    _, state = groups.update(zeros, groups.init(params), live)
    save_params_ema(tmp_path / "groups", state)
    equal(load_params_ema(tmp_path / "groups", groups.init(params)), state)

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    chain = optax.chain(optax.sgd(0.1), params_ema(0.9, compensated=True, on_nonfinite="skip"))
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    file = save_params_ema(tmp_path / "nnx", optimizer.opt_state)
    before = jax.tree.map(jnp.copy, nnx.as_pure(optimizer.opt_state))
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    optimizer.opt_state = load_params_ema(file, optimizer.opt_state)
    equal(nnx.as_pure(optimizer.opt_state)[1], before[1])


def test_names_that_collide_are_refused(tmp_path):
    params = {"w": jnp.ones(2), "remainder/w": jnp.ones(2)}
    tx = params_ema(0.9, compensated=True)
    with pytest.raises(
        ema.CheckpointError, match="`remainder/w` is also the name of the remainder of `w`"
    ):
        save_params_ema(tmp_path, tx.init(params))
    save_params_ema(tmp_path, params_ema(0.9).init(params))
