"""Every schedule, for both backends."""

import importlib
import math
import os

import pytest

import ema
from ema.schedules import EXAMPLES

BACKENDS = os.environ.get("EMA_TEST_BACKENDS", "torch,jax").split(",")

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
