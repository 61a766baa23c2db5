"""What optax holds its contributed transforms to, its own ``contrib/_common_test.py``, held to.

The base optimizer is sgd, as for optax's own wrappers; ``params_ema`` is tested alone wherever
the contract does not ask for convergence.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ema
from ema.jax_backend import get_params_ema, params_ema
from tests.jax_helpers import grads

KINDS = {
    "plain": lambda: params_ema(0.9),
    "schedule": lambda: params_ema(ema.InverseGammaWarmup(decay=0.99), update_every=2),
    "several": lambda: params_ema({"a": 0.9, "b": ema.HalfLife(steps=5)}, update_after_step=1),
    "precise": lambda: params_ema(
        {"a": 0.9, "b": 0.99}, compensated=True, on_nonfinite="skip", update_every=2
    ),
    "narrow": lambda: params_ema(0.9, accumulator_dtype=jnp.bfloat16, on_nonfinite="skip"),
}


@pytest.fixture(params=KINDS)
def average(request):
    return KINDS[request.param]()


@pytest.fixture(autouse=True)
def standard_promotion():
    """The promotion that optax itself is written for."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def parabola(dtype=jnp.float32):
    """Parameters at the start, at the end, and the objective between them."""
    final = jnp.array([1.0, -1.0, 1.0], dtype)
    return jnp.array([-1.0, 10.0, 1.0], dtype), final, lambda p: jnp.sum((p - final) ** 2)


def test_extra_arguments_pass_by_and_nothing_is_compiled_twice(average):
    start, _, objective = parabola()
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        grads = jax.grad(objective)(params)
        updates, state = average.update(grads, state, params, nobody_expects_this=1)
        return optax.apply_updates(params, updates), state

    params, state = start, average.init(start)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1


def test_the_average_converges_with_the_parameters(average):
    start, final, objective = parabola()
    tx = optax.chain(optax.sgd(0.1), average)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    state = optax.tree.map_params(tx, lambda v: v, tx.init(start))
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=2000))((start, state))
    for tree in state[-1].averages().values():
        np.testing.assert_allclose(tree, final, rtol=3e-2, atol=3e-2)
    np.testing.assert_allclose(params, final, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compensated": True, "on_nonfinite": "skip"},
        {"accumulator_dtype": jnp.bfloat16, "seed": 2**63},
    ],
    ids=["plain", "precise", "narrow"],
)
def test_inject_hyperparams_changes_nothing(options):
    options = {"decay": 0.75, "update_every": 1, **options}
    inject = optax.inject_hyperparams(params_ema, static_args=("accumulator_dtype", "seed"))
    plain, injected = params_ema(**options), inject(**options)
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))]
    updates, state = jax.jit(plain.update)(grads, jax.jit(plain.init)(params), params)
    theirs, inner = jax.jit(injected.update)(grads, jax.jit(injected.init)(params), params)
    jax.tree.map(np.testing.assert_array_equal, theirs, updates)
    jax.tree.map(np.testing.assert_array_equal, inner.inner_state, state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_updates_keep_their_dtype_and_pass_unchanged(average, dtype):
    params = jnp.array([1.0, 2.0], dtype)
    grads = jax.grad(lambda x: jnp.sum(x**2))(params)
    updates, _ = jax.jit(average.update)(grads, jax.jit(average.init)(params), params)
    assert updates.dtype == dtype
    np.testing.assert_array_equal(updates, grads)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradient_accumulation(average, dtype):
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), average), every_k_schedule=4)
    params = jnp.array([1.0, 2.0], dtype)
    grads = jax.grad(lambda x: jnp.sum(x**2))(params)
    updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    np.testing.assert_array_equal(updates, jnp.zeros_like(grads))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_the_state_keeps_shapes_dtypes_and_weak_types(average, dtype):
    """``lax.cond`` between the old and the new state refuses whatever differs."""
    with jax.enable_x64(dtype == jnp.float64):
        start, _, objective = parabola(dtype)

        @jax.jit
        def step(params, state):
            grads = jax.grad(objective)(params)
            heads = jax.random.randint(jax.random.key(0), (), 0, 2) == 0
            updates, state = jax.lax.cond(
                heads, lambda: average.update(grads, state, params), lambda: (params, state)
            )
            return optax.apply_updates(params, updates), state

        params, state = start, average.init(start)
        for _ in range(2):
            params, new_state = step(params, state)
            assert params.dtype == dtype
            state = jax.lax.cond(jnp.array(True), lambda: new_state, lambda: state)  # noqa: B023


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compensated": True, "on_nonfinite": "skip"},
        {"accumulator_dtype": jnp.bfloat16, "on_nonfinite": "skip"},
    ],
    ids=["plain", "precise", "narrow"],
)
@pytest.mark.parametrize("wrapper", ["named_chain", "freeze", "partition", "checkpoint", "export"])
def test_wrapped_it_gives_the_bits_of_the_plain_chain(wrapper, options, params):
    average = params_ema({"a": 0.9, "b": ema.RampWarmup(decay=0.9)}, update_every=2, **options)
    plain = optax.chain(optax.sgd(0.1), average)
    tx = {
        "named_chain": optax.named_chain(("opt", optax.sgd(0.1)), ("ema", average)),
        "freeze": optax.chain(
            optax.sgd(0.1), optax.freeze({"dense": {"kernel": False}, "bias": False}), average
        ),
        "partition": optax.partition({0: plain}, {"dense": 0, "bias": 0}),
    }.get(wrapper, plain)

    def step_of(tx):
        def step(params, state, k):
            updates, state = tx.update(grads(params, k), state, params)
            return optax.apply_updates(params, updates), state

        return step

    step = {
        "checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
        "export": lambda f: exported(f, params, tx.init(params)),
    }.get(wrapper, jax.jit)(step_of(tx))
    live, state = params, tx.init(params)
    expected, expected_state = params, plain.init(params)
    for k in range(4):
        live, state = step(live, state, jnp.int32(k))
        expected, expected_state = jax.jit(step_of(plain))(expected, expected_state, jnp.int32(k))
    for name in "ab":
        jax.tree.map(
            np.testing.assert_array_equal,
            get_params_ema(state, live, name),
            get_params_ema(expected_state, expected, name),
        )


def exported(step, params, state):
    """The step as a program by itself: leaves in, leaves out, for it knows no NamedTuples."""
    leaves, structure = jax.tree.flatten((params, state))
    flat = jax.jit(lambda leaves, k: jax.tree.leaves(step(*structure.unflatten(leaves), k)))
    program = jax.export.export(flat)(leaves, jnp.int32(0))
    return lambda params, state, k: structure.unflatten(
        program.call(jax.tree.leaves((params, state)), k)
    )


def test_frozen_parameters_are_their_own_average(params):
    tx = optax.chain(
        optax.sgd(0.1), optax.freeze({"dense": {"kernel": True}, "bias": False}), params_ema(0.5)
    )
    _, state = jax.jit(tx.update)(grads(params, 0), tx.init(params), params)
    average = get_params_ema(state)
    np.testing.assert_array_equal(average["dense"]["kernel"], params["dense"]["kernel"])
    assert not np.array_equal(average["bias"], params["bias"])


def test_gradients_flow_through_the_update(params):
    """For hypernetworks and meta-learning: the average is linear in the new parameters."""
    tx = params_ema(0.75)
    state = tx.init(params)

    def loss(updates):
        _, after = tx.update(updates, state, params)
        return jnp.sum(after.params_ema["bias"])

    grads = jax.grad(loss)(jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(grads["bias"], 0.25)
    np.testing.assert_array_equal(grads["dense"]["kernel"], 0)
