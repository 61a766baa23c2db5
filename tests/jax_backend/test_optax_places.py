"""Every wrapper of optax, with the average inside it or behind: right there, or refused.

The expected average is that of the params after each step that its count says is averaged.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import ema
from ema import ArgumentError, ModelError, StateError
from ema.jax_backend import ParamsEMAState, get_params_ema, params_ema, save_params_ema

DECAY = 0.5
AROUND = optax.chain(contrib.normalize(), optax.sgd(0.05))
"""The steps with which sam looks around."""


def sgd():
    return optax.sgd(0.1)


def average():
    return params_ema(DECAY)


def inner():
    return optax.chain(sgd(), average())


def odd(step, *_, **__):
    return step % 2 == 1


RIGHT = {
    "named_chain": lambda: optax.named_chain(("o", sgd()), ("e", average())),
    "inject_hyperparams": lambda: optax.chain(
        sgd(), optax.inject_hyperparams(params_ema)(decay=DECAY)
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(inner(), 3),
    "MultiSteps": lambda: optax.MultiSteps(inner(), 2).gradient_transformation(),
    "behind MultiSteps": lambda: optax.chain(
        optax.MultiSteps(sgd(), 2).gradient_transformation(), average()
    ),
    "conditionally_mask": lambda: optax.conditionally_mask(inner(), odd),
    "conditionally_transform": lambda: optax.chain(
        sgd(), optax.conditionally_transform(average(), odd)
    ),
    "partition": lambda: optax.partition({"a": inner(), "b": inner()}, {"w": "a", "v": "b"}),
    "selective_transform": lambda: optax.selective_transform(
        inner(), freeze_mask={"w": False, "v": True}
    ),
    "behind freeze": lambda: optax.chain(sgd(), optax.freeze({"w": False, "v": True}), average()),
    "behind flatten": lambda: optax.chain(optax.flatten(sgd()), average()),
    "split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(inner()),
    "behind galore": lambda: optax.chain(contrib.galore(0.1, rank=1), average()),
    "behind mechanize": lambda: optax.chain(contrib.mechanize(sgd()), average()),
    "behind schedule_free": lambda: optax.chain(contrib.schedule_free(sgd(), 0.1), average()),
    "behind lookahead": lambda: optax.chain(optax.lookahead(sgd(), 3, 0.5), average()),
    "inside sam": lambda: contrib.sam(inner(), AROUND, sync_period=2),
    "behind opaque sam": lambda: optax.chain(
        contrib.sam(sgd(), AROUND, sync_period=2, opaque_mode=True), average()
    ),
    "inside opaque sam": lambda: contrib.sam(inner(), AROUND, sync_period=2, opaque_mode=True),
    "reduce_on_plateau": lambda: optax.chain(sgd(), contrib.reduce_on_plateau(), average()),
    "lbfgs": lambda: optax.chain(optax.lbfgs(), average()),
    "polyak_sgd": lambda: optax.chain(optax.polyak_sgd(), average()),
    "prodigy": lambda: optax.chain(contrib.prodigy(), average()),
    "muon": lambda: optax.chain(contrib.muon(0.1), average()),
    "keep_params_nonnegative": lambda: optax.chain(
        sgd(), optax.keep_params_nonnegative(), average()
    ),
    "with_extra_args_support": lambda: optax.with_extra_args_support(inner()),
}
EXTRA = {
    "reduce_on_plateau": ("value",),
    "lbfgs": ("value", "grad", "value_fn"),
    "polyak_sgd": ("value",),
    "behind opaque sam": ("grad_fn",),
    "inside opaque sam": ("grad_fn",),
}
REFUSED_WHEN_READ = {
    "lookahead": (lambda: optax.lookahead(inner(), 3, 0.5), "inside lookahead misses the synchron"),
    "mechanize": (lambda: contrib.mechanize(inner()), "inside mechanize averages parameters that"),
    "schedule_free": (
        lambda: contrib.schedule_free(inner(), 0.1),
        "inside schedule_free does not average",
    ),
    "behind sam": (
        lambda: optax.chain(contrib.sam(sgd(), AROUND, sync_period=2), average()),
        "after sam averages the perturbed",
    ),
    "deep behind sam": (
        lambda: optax.chain(
            optax.chain(contrib.sam(sgd(), AROUND), optax.identity()),
            optax.masked(average(), {"w": True, "v": True}),
        ),
        "after sam averages the perturbed",
    ),
    "in the steps around": (
        lambda: contrib.sam(sgd(), optax.chain(AROUND, average())),
        "inside the adversarial optimizer of sam",
    ),
    "in apply_if_finite": (
        lambda: optax.apply_if_finite(contrib.mechanize(inner()), 3),
        "inside mechanize",
    ),
}


def objective(params):
    return sum(jnp.sum((leaf - 0.3) ** 2) for leaf in jax.tree.leaves(params))


@pytest.fixture(autouse=True)
def standard_promotion():
    """The promotion that optax itself is written for."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def start():
    return {"w": jnp.array([[1.0, 2.0], [0.5, 3.0]]), "v": jnp.ones(3)}


def counted(state):
    leaves = jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, ParamsEMAState))
    return [int(leaf.count) for leaf in leaves if isinstance(leaf, ParamsEMAState)]


def arguments(name, params):
    every = {
        "value": lambda: objective(params),
        "grad": lambda: jax.grad(objective)(params),
        "value_fn": lambda: objective,
        "grad_fn": lambda: lambda p, _: jax.grad(objective)(p),
    }
    return {key: every[key]() for key in EXTRA.get(name, ())}


@pytest.mark.parametrize("name", RIGHT)
def test_it_is_the_average_of_the_params_that_are_made(name, start):
    tx = RIGHT[name]()
    fast = "lookahead" in name
    params = optax.LookaheadParams.init_synced(start) if fast else start
    state = tx.init(params)
    expected, before = jax.tree.map(np.float64, params), counted(state)
    for _ in range(10):
        live = params.fast if fast else params
        updates, state = tx.update(
            jax.grad(objective)(live), state, params, **arguments(name, live)
        )
        params = optax.apply_updates(params, updates)
        if counted(state) != before:
            expected = jax.tree.map(
                lambda e, p: DECAY * e + (1 - DECAY) * np.float64(p), expected, params
            )
        before = counted(state)
    assert before[0] >= 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = get_params_ema(state, params)
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6), found, expected
    )


@pytest.mark.parametrize("name", REFUSED_WHEN_READ)
def test_where_it_cannot_be_right_it_is_refused_when_it_is_read(name, start, tmp_path):
    make, message = REFUSED_WHEN_READ[name]
    state = make().init(start)
    for read in (get_params_ema, lambda s: save_params_ema(tmp_path, s)):
        with pytest.raises(StateError, match=message):
            read(state)
    assert list(tmp_path.iterdir()) == []


def test_inside_galore_it_is_refused_at_the_first_update(start):
    """Which gives no params to what it wraps."""
    tx = contrib.galore(0.1, rank=1, base_optimizer=inner())
    with pytest.raises(ArgumentError, match="`params` must be given to average them"):
        tx.update(start, tx.init(start), start)


def test_inside_flatten_it_is_no_average_of_these_leaves(start):
    tx = optax.flatten(inner())
    with pytest.raises(ModelError, match="`params` do not match the average"):
        get_params_ema(tx.init(start), start)


def test_without_updates_the_params_are_averaged_as_they_are():
    """A target network that follows its online one, eagerly and compiled; no optimizer."""
    tx = params_ema(0.75, update_every=2)
    online, state = {"w": jnp.ones(2), "n": 3}, tx.init({"w": jnp.zeros(2), "n": 3})
    updates, state = tx.update(None, state, online)
    assert updates is None
    step = jax.jit(lambda state, params: tx.update(None, state, params)[1])
    for _ in range(3):
        state = step(state, online)
    assert (int(state.step), int(state.count)) == (4, 2)
    np.testing.assert_allclose(get_params_ema(state, online)["w"], 1 - 0.75**2)


OPTIONS = {
    "plain": {},
    "compensated": {"compensated": True},
    "narrow": {"accumulator_dtype": jnp.bfloat16},
    "guarded": {"on_nonfinite": "skip"},
    "late and seldom": {"update_after_step": 1, "update_every": 2},
}
SCHEDULES = [
    0.9,
    ema.HalfLife(steps=5),
    ema.PowerFunction(gamma=6.94),
    ema.PowerFunction(gamma=0.0),
    ema.RampWarmup(decay=0.9),
    ema.InverseGammaWarmup(decay=0.9),
    ema.UniformAverage(),
    ema.DebiasedDecay(decay=0.9),
]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_nothing_is_reported_under_debug_infs_and_debug_nans(schedule, options):
    tx = params_ema(schedule, **options)
    params = {"w": jnp.ones(2), "h": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2, jnp.complex64)}
    with jax.debug_infs(True), jax.debug_nans(True):
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(None, state, params)
        get_params_ema(state, params)
