"""In every wrapper of optax: training does not notice the average, which sees the params that are made.

An average that still follows its params (``update_after_step``) equals them bit for bit, so that each
bit in which it differs was computed otherwise.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ema.jax_backend import get_params_ema, params_ema

OPTIMIZERS = {"sgd": lambda: optax.sgd(0.1), "adamw": lambda: optax.adamw(0.01)}
OPTIONS = {"decay": 0.9, "update_after_step": 10**6}
LABELS = {"w": "a", "b": "b", "s": "a"}
STEPS = 8


def chained(optimizer, links):
    return optax.chain(optimizer, *links)


def grouped(partition):
    def make(optimizer, links):
        group = chained(optimizer, links)
        return partition({"a": group, "b": group}, LABELS)

    return make


def injected(optimizer, links):
    inject = optax.inject_hyperparams(params_ema)
    return optax.chain(optimizer, *(inject(**OPTIONS) for _ in links))


WRAPPERS = {
    "plain": chained,
    "MultiSteps": lambda o, e: optax.MultiSteps(chained(o, e), 2).gradient_transformation(),
    "apply_if_finite": lambda o, e: optax.apply_if_finite(chained(o, e), 5),
    "masked": lambda o, e: optax.masked(chained(o, e), dict.fromkeys(LABELS, True)),
    "partition": grouped(optax.partition),
    "multi_transform": grouped(optax.multi_transform),
    "inject_hyperparams": injected,
    "named_chain": lambda o, e: optax.named_chain(("o", o), *(("e", link) for link in e)),
    "selective_transform": lambda o, e: optax.selective_transform(
        chained(o, e), freeze_mask={"w": False, "b": True, "s": False}
    ),
}
OTHERWISE = {"apply_if_finite": {"w", "b", "s"}, "MultiSteps": {"s"}}
"""Leaves whose updates these wrappers round before they are applied, and their average does not."""


def loss(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2) * params["s"] ** 2


def start():
    rng = np.random.default_rng(0)
    values = {"w": rng.normal(size=(64, 64)), "b": rng.normal(size=64), "s": 1.3}
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def jitted(step, state):
    compiled, history = jax.jit(step), []
    for x in inputs():
        state, seen = compiled(state, x)
        history.append(seen)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *history)


def scanned(step, state):
    return jax.jit(lambda state: jax.lax.scan(step, state, inputs()))(state)[1]


def vmapped(step, state):
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    return jitted(jax.vmap(step, in_axes=(0, None)), two)


def inputs():
    return jnp.asarray(np.random.default_rng(1).normal(size=(STEPS, 8, 64)), jnp.float32)


CONTEXTS = {"jitted": jitted, "scanned": scanned, "vmapped": vmapped}
CASES = [
    *(("adamw", wrapper, context) for wrapper in WRAPPERS for context in CONTEXTS),
    *(("sgd", wrapper, "vmapped") for wrapper in ("plain", "MultiSteps", "apply_if_finite")),
]


def run(tx, context):
    """Params, updates and averages of every step; without an average the params in their place."""

    def step(carry, x):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, updates, state)

    params = start()
    params, updates, state = context(step, (params, tx.init(params)))
    return params, updates, state


def differing(one, two):
    return {name for name in one if not np.array_equal(one[name], two[name])}


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "wrapper", "context"), CASES)
def test_the_average_has_the_bits_of_the_params_and_training_those_it_had(
    optimizer, wrapper, context
):
    with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes dtypes itself
        make, base, around = WRAPPERS[wrapper], OPTIMIZERS[optimizer](), CONTEXTS[context]
        params, updates, state = run(make(base, [params_ema(**OPTIONS)]), around)
        without, _, _ = run(make(base, []), around)
        averages = get_params_ema(state, params)
    assert differing(params, without) == set()
    assert differing(params, averages) <= OTHERWISE.get(wrapper, set())
    for name, value in params.items():  # and there by the last bit of what is added
        size = np.maximum(np.abs(value), np.abs(updates[name]))
        assert (np.abs(averages[name] - value) <= np.finfo(np.float32).eps * size).all()
