"""Conversions between decay, half-life, window and weight."""

from __future__ import annotations

import math

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ema

decays = st.floats(1e-9, 1 - 1e-12)
half_lives = st.floats(1e-2, 1e9)


@pytest.mark.parametrize(
    ("total_steps", "decay"),
    [(1_000, 0.9930924954), (10_000, 0.9993070929904525), (100_000, 0.999930687684)],
)
def test_the_optimal_decay_has_a_half_life_of_a_tenth_of_the_run(total_steps, decay):
    assert ema.compute_optimal_decay(total_steps) == pytest.approx(decay, rel=1e-10)
    assert ema.half_life_from_decay(decay) == pytest.approx(total_steps / 10, rel=1e-6)


def test_the_optimal_decay_takes_another_half_life():
    assert ema.compute_optimal_decay(10_000, 50) == ema.decay_from_half_life(50)
    assert ema.compute_optimal_decay(10_000, target_half_life_steps=1) == 0.5


@given(half_lives)
def test_a_value_counts_half_after_its_half_life(half_life):
    with mpmath.workdps(40):
        exact = mpmath.power(2, -1 / mpmath.mpf(half_life))
        assert abs(ema.decay_from_half_life(half_life) / exact - 1) < 1e-13


@given(decays)
def test_half_life_and_decay_are_inverse_to_each_other(decay):
    assert ema.decay_from_half_life(ema.half_life_from_decay(decay)) == pytest.approx(
        decay, rel=1e-13
    )


@given(decays)
def test_the_window_is_the_mean_age_of_what_the_average_remembers(decay):
    """Σ k (1 − β) β^(k−1) = 1 / (1 − β)."""
    with mpmath.workdps(30):
        exact = 1 / (1 - mpmath.mpf(decay))
        assert abs(ema.window_from_decay(decay) / exact - 1) < 1e-15


def test_the_mean_age_summed_by_hand_is_the_window():
    ages = range(1, 5_000)
    assert sum(k * 0.01 * 0.99 ** (k - 1) for k in ages) == pytest.approx(
        ema.window_from_decay(0.99)
    )


@given(decays, st.floats(0.1, 100))
def test_scaling_a_decay_divides_its_half_life(decay, ratio):
    scaled = ema.scale_decay(decay, ratio)
    if 1e-300 < scaled < 1 - 1e-12:
        expected = ema.half_life_from_decay(decay) / ratio
        assert ema.half_life_from_decay(scaled) == pytest.approx(expected, rel=1e-3)


def test_scaling_is_repeated_multiplication():
    assert ema.scale_decay(0.9999, 8) == pytest.approx(math.prod([0.9999] * 8), rel=1e-15)


def test_the_ends_have_no_memory_and_endless_memory():
    assert ema.half_life_from_decay(0) == 0.0
    assert ema.half_life_from_decay(1) == math.inf
    assert ema.window_from_decay(0) == 1.0
    assert ema.window_from_decay(1) == math.inf
    assert ema.scale_decay(0, 3) == 0.0
    assert ema.scale_decay(1, 3) == 1.0


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False))
def test_every_half_life_gives_a_decay_in_the_unit_interval(half_life):
    assert 0.0 <= ema.decay_from_half_life(half_life) <= 1.0
