"""Runs in both backends on one sequence of parameters."""

import importlib
import math
import os
from typing import NamedTuple

import numpy as np
import pytest

import ema
from ema.schedules import EXAMPLES

BACKENDS = os.environ.get("EMA_TEST_BACKENDS", "torch,jax").split(",")

SHAPES = {"kernel": (33, 21), "bias": (37,), "scale": ()}

SCHEDULES = {
    "constant": ema.ConstantDecay(decay=0.99),
    "slow": ema.ConstantDecay(decay=0.9999),
    "fast": ema.ConstantDecay(decay=0.3),
    "half-life": ema.HalfLife(steps=50),
    "rampup": ema.HalfLifeRampup(steps=100, rampup_ratio=0.1),
    "fraction": ema.HalfLifeRampup(steps=math.inf, rampup_ratio=0.1),
    "inverse-gamma": ema.InverseGammaWarmup(decay=0.995),
    "ramp": ema.RampWarmup(decay=0.99),
    "exponential": ema.ExponentialRamp(decay=0.99, tau=100),
    "debiased": ema.DebiasedDecay(decay=0.999),
    "power": ema.PowerFunction.from_std(0.1),
    "cosine": ema.CosineDecay(start=0.9, total_steps=900),
    "uniform": ema.UniformAverage(),
}
_NAMED = {type(schedule) for schedule in SCHEDULES.values()}
SCHEDULES |= {
    type(example).__name__: example for example in EXAMPLES if type(example) not in _NAMED
}


@pytest.fixture(scope="session", autouse=True)
def _all_backends():
    """A backend that is asked for and not installed fails; nothing is skipped silently."""
    for backend in BACKENDS:
        importlib.import_module(f"ema.{backend}_backend")


@pytest.fixture
def schedules():
    """Every schedule, by name."""
    return SCHEDULES


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    """One of them, as a mapping of one."""
    return {request.param: SCHEDULES[request.param]}


class Run(NamedTuple):
    """Parameters before the first and after every step, and averages after every step."""

    params: dict[str, np.ndarray]
    averages: dict[str, dict[str, np.ndarray]]  # by schedule, by leaf


@pytest.fixture(scope="session")
def run_jax():
    """Train a noisy quadratic with optax, in a scan or in plain jitted steps."""
    import jax
    import jax.numpy as jnp
    import optax

    from ema.jax_backend import get_params_ema, params_ema

    def run(schedules, *, dtype, optimizer, steps, scan=True, **options):
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

    return run


@pytest.fixture(scope="session")
def run_torch():
    """Feed a sequence of parameters to EMAModel on the CPU."""
    import torch
    from torch import nn

    from ema.torch_backend import EMAModel

    def run(schedules, params, *, dtype, accumulator_dtype=None, **options):
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

    return run


@pytest.fixture(scope="session")
def oracle():
    """The recursion in float64."""

    def run(schedule, params, update_after_step=0, update_every=1):
        average = params[0].astype(np.float64)
        for step, live in enumerate(params[1:], start=1):
            since = step - update_after_step
            if since <= 0:
                average = live.astype(np.float64)
            elif since % update_every == 0:
                weight = schedule.weight(float(since // update_every), update_every)
                average = average + weight * (live.astype(np.float64) - average)
            yield average

    return run
