"""The algebra of power-function profiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ema
from ema import profiles


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_those_of_the_edm2_paper(std, gamma):
    assert round(ema.PowerFunction.from_std(std).gamma, 2) == gamma


@given(st.floats(1e-6, profiles.LARGEST_STD))
def test_the_exponent_has_the_width_that_was_asked_for(std):
    assert profiles.std_from_gamma(profiles.gamma_from_std(std)) == pytest.approx(std, rel=1e-13)


@given(st.floats(1e-3, 1e6))
def test_the_width_has_the_exponent_that_gave_it(gamma):
    assert profiles.gamma_from_std(profiles.std_from_gamma(gamma)) == pytest.approx(gamma, rel=1e-9)


def test_the_flattest_profile_is_the_uniform_one():
    assert profiles.std_from_gamma(0) == pytest.approx(profiles.LARGEST_STD, rel=1e-15)
    assert profiles.gamma_from_std(profiles.LARGEST_STD) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("std", [0.03, 0.1, 0.25])
def test_the_memory_of_the_schedule_is_as_wide_as_its_name_says(std):
    """Each update's contribution to the average after 20 000 updates, multiplied out."""
    updates = 20_000
    counts = np.arange(2, updates + 1, dtype=np.float64)
    weights = np.concatenate([[1.0], ema.PowerFunction.from_std(std).weight(counts, 1, np)])
    survival = np.concatenate([np.cumprod((1 - weights)[::-1])[::-1][1:], [1.0]])
    contribution = weights * survival
    times = np.arange(1, updates + 1) / updates
    mean = (contribution * times).sum()
    assert contribution.sum() == pytest.approx(1, rel=1e-12)
    assert math.sqrt((contribution * (times - mean) ** 2).sum()) == pytest.approx(std, rel=1e-3)
