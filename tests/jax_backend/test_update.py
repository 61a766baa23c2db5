"""The equation itself, and the weights it is given."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ema
from ema.jax_backend.update.equation import lerp, update_weight

SCHEDULES = [
    ema.ConstantDecay(decay=0.9999),
    ema.HalfLife(steps=12345),
    ema.HalfLifeRampup(steps=50_000, rampup_ratio=0.05),
    ema.InverseGammaWarmup(decay=0.99999),
    ema.RampWarmup(decay=0.9999),
    ema.HalfLifeRampup(steps=math.inf, rampup_ratio=0.05),
    ema.ExponentialRamp(decay=0.9999, tau=2000),
    ema.DebiasedDecay(decay=0.9999),
    ema.PowerFunction.from_std(0.1),
    ema.CosineDecay(start=0.99, end=1.0, total_steps=900_000),
    ema.UniformAverage(),
]


def test_ends_are_copies_even_where_arithmetic_has_no_answer():
    """Inf − Inf and 0 · Inf are NaN: weight 1 gives the params, weight 0 the average."""
    average = jnp.array([jnp.inf, -jnp.inf, 1.0, -0.0], jnp.float32)
    params = jnp.array([jnp.inf, 2.0, jnp.nan, 3.0], jnp.float32)
    np.testing.assert_array_equal(lerp(average, params, jnp.float32(1)), params)
    kept = lerp(average, params, jnp.float32(0))
    np.testing.assert_array_equal(kept, average)
    assert np.signbit(kept[3])


@pytest.mark.parametrize("weight", [1e-5, 0.3, 0.499, 0.5, 0.7, 1 - 1e-5])
def test_it_is_the_fused_two_branch_form(weight):
    """Each branch is rounded as fused multiply-adds round it, emulated in longer arithmetic."""
    rng = np.random.default_rng(0)
    a, p = (rng.normal(size=1000).astype(np.float32) for _ in range(2))
    w = np.float32(weight)
    difference = (p - a).astype(np.longdouble)
    if w < 0.5:
        expected = a.astype(np.longdouble) + np.longdouble(w) * difference
    else:
        expected = p.astype(np.longdouble) - difference * np.longdouble(np.float32(1) - w)
    np.testing.assert_array_equal(lerp(a, p, jnp.asarray(w)), expected.astype(np.float32))


def test_complex_is_two_reals():
    rng = np.random.default_rng(1)
    a, p = ((rng.normal(size=8) + 1j * rng.normal(size=8)).astype(np.complex64) for _ in range(2))
    w = jnp.float32(0.125)
    mixed = lerp(a, p, w)
    assert mixed.dtype == jnp.complex64
    np.testing.assert_array_equal(jnp.real(mixed), lerp(a.real.copy(), p.real.copy(), w))
    np.testing.assert_array_equal(jnp.imag(mixed), lerp(a.imag.copy(), p.imag.copy(), w))


@pytest.mark.slow
@pytest.mark.parametrize("span", [1, 3])
def test_a_million_weights_equal_those_of_python(span):
    """Scalar traced counts 1 … 1e6 of every schedule: float32 of the Python value, no exception."""
    counts = np.arange(1, 1_000_001, dtype=np.int32)

    @jax.jit
    def traced(counts):
        return jax.lax.map(
            lambda n: [update_weight(s, n, span, jnp.float32) for s in SCHEDULES], counts
        )

    numbers = counts.astype(np.float64).tolist()
    for schedule, weights in zip(SCHEDULES, traced(counts), strict=True):
        expected = np.array([schedule.weight(n, span) for n in numbers]).astype(np.float32)
        assert np.count_nonzero(np.asarray(weights) != expected) == 0, schedule


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_traced_span_gives_the_weight_of_a_static_one(schedule):
    """Also where count · span is beyond int32."""
    traced = jax.jit(lambda n, k: update_weight(schedule, n, k, jnp.float32))
    for count, span in [(1, 3), (1000, 7), (1_000_000, 10_000)]:
        weight = traced(jnp.int32(count), jnp.int32(span))
        assert weight == np.float32(schedule.weight(float(count), span))


def test_a_float64_weight_is_not_rounded():
    with jax.enable_x64(True):
        weight = update_weight(ema.HalfLife(steps=1e6), jnp.int32(1), 1, jnp.float64)
        assert weight == ema.HalfLife(steps=1e6).weight(1.0)
