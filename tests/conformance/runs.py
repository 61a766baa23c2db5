"""Runs in both backends on one sequence of parameters, and the average of the oracle."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.oracle import averages

__all__ = ["SHAPES", "Run", "oracle", "run_jax", "run_torch"]

SHAPES = {"kernel": (33, 21), "bias": (37,), "scale": ()}


class Run(NamedTuple):
    """Parameters before the first and after every step, and averages after every step."""

    params: dict[str, np.ndarray]
    averages: dict[str, dict[str, np.ndarray]]  # by schedule, by leaf


def run_jax(schedules, *, dtype, optimizer, steps, scan=True, **options):
    """Train a noisy quadratic with optax, in a scan or in plain jitted steps."""
    import jax
    import jax.numpy as jnp
    import optax

    from ema.jax_backend import get_params_ema, params_ema

    chain = {"adamw": optax.adamw(1e-2), "sgd": optax.sgd(1e-2, momentum=0.9)}[optimizer]
    averages = [params_ema(s, name=name, **options) for name, s in schedules.items()]
    tx = optax.chain(chain, *averages)
    rng = np.random.default_rng(0)
    start = {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in SHAPES.items()}
    noise = {n: jnp.asarray(rng.normal(size=(steps, *s)), dtype) for n, s in SHAPES.items()}

    def step(carry, noise):
        params, opt_state = carry
        grads = jax.tree.map(lambda p, n: p * 0.3 + n, params, noise)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        read = {name: get_params_ema(opt_state, name=name) for name in schedules}
        return (params, opt_state), (params, read)

    carry = (start, tx.init(start))
    if scan:
        _, (history, read) = jax.jit(lambda c, n: jax.lax.scan(step, c, n))(carry, noise)
    else:
        jitted, outputs = jax.jit(step), []
        for index in range(steps):
            carry, output = jitted(carry, jax.tree.map(lambda n, i=index: n[i], noise))
            outputs.append(output)
        history, read = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    params = jax.tree.map(lambda s, h: jnp.concatenate([s[None], h]), start, history)
    as_float32 = jax.tree.map(lambda a: np.asarray(a.astype(jnp.float32)), (params, read))
    return Run(*as_float32)


def run_torch(schedules, params, *, dtype, accumulator_dtype=None, **options):
    """Feed a sequence of parameters to EMAModel on the CPU."""
    import torch
    from torch import nn

    from ema.torch_backend import EMAModel

    if accumulator_dtype is not None:
        options["dtype"] = getattr(torch, accumulator_dtype)
    model = nn.ParameterDict(
        {
            name: nn.Parameter(torch.tensor(values[0], dtype=getattr(torch, dtype)))
            for name, values in params.items()
        }
    )
    ema_models = {name: EMAModel(model, s, **options) for name, s in schedules.items()}
    steps = len(next(iter(params.values()))) - 1
    averages = {
        name: {leaf: np.empty((steps, *SHAPES[leaf]), np.float32) for leaf in params}
        for name in schedules
    }
    sequence = {leaf: torch.tensor(values) for leaf, values in params.items()}
    for step in range(1, steps + 1):
        with torch.no_grad():
            for leaf, values in sequence.items():
                model[leaf].copy_(values[step])
        for name, ema_model in ema_models.items():
            ema_model.update()
            for leaf, average in ema_model.averaged_parameters().items():
                averages[name][leaf][step - 1] = average.detach().float().numpy()
    return averages


def oracle(schedule, params, update_after_step=0, update_every=1):
    """The average after each step in float64."""
    return averages(
        params[0],
        params[1:],
        lambda n, _: schedule.weight(float(n), update_every),
        update_after_step=update_after_step,
        update_every=update_every,
    )
