"""A misplaced average is reported where the optimizer's state shows it."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from optax import contrib

import ema
from ema.jax_backend import get_params_ema, params_ema


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(params_ema(0.9), optax.adam(0.1)),
        optax.chain(optax.chain(params_ema(0.9), optax.trace(0.9)), optax.scale(-0.1)),
        optax.apply_if_finite(optax.chain(params_ema(0.9), optax.adam(0.1)), 3),
        optax.chain(params_ema(0.9), optax.chain(optax.clip(1.0), optax.adam(0.1))),
    ],
)
def test_an_optimizer_behind_the_average_is_noticed(tx, params):
    with pytest.warns(ema.EMAWarning, match=r"stands before (ScaleByAdam|Trace)State.*last link"):
        get_params_ema(tx.init(params))


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.adam(0.1), params_ema(0.9)),
        optax.chain(optax.adam(0.1), params_ema(0.9), optax.identity()),
        optax.chain(optax.adam(0.1), params_ema(0.9), optax.snapshot("u", lambda u: u)),
        optax.chain(optax.adam(0.1), params_ema(0.9), optax.masked(params_ema(0.9), {})),
        optax.partition({0: optax.chain(optax.adam(0.1), params_ema(0.9))}, 0),
    ],
)
def test_the_last_link_and_what_changes_no_update_are_right(tx):
    params = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_params_ema(tx.init(params), params)


def test_it_is_noticed_in_an_nnx_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(params_ema(0.9), optax.adam(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    with pytest.warns(ema.EMAWarning, match="last link"):
        get_params_ema(optimizer)


def test_inside_schedule_free_it_is_refused_and_behind_it_allowed():
    """Its inner updates go to another sequence than the params."""
    params = jnp.ones(3)
    inside = contrib.schedule_free(optax.chain(optax.sgd(0.1), params_ema(0.9)), 0.1)
    with pytest.raises(ema.StateError, match="schedule_free_eval_params"):
        get_params_ema(inside.init(params))
    behind = optax.chain(contrib.schedule_free(optax.sgd(0.1), 0.1), params_ema(0.9))
    assert get_params_ema(behind.init(params)).shape == (3,)
