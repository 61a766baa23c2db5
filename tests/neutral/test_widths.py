"""Exponent and width of power-function averages."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ema
from ema import profiles, widths


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_those_of_the_edm2_paper(std, gamma):
    assert round(ema.PowerFunction.from_std(std).gamma, 2) == gamma


@given(st.floats(1e-6, profiles.LARGEST_STD))
def test_the_exponent_has_the_width_that_was_asked_for(std):
    assert profiles.std_from_gamma(profiles.gamma_from_std(std)) == pytest.approx(std, rel=1e-13)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.10, 0.15, 0.25])
def test_exponents_agree_with_fifty_digits_to_1e_12(std):
    with mpmath.workdps(50):
        start = profiles.gamma_from_std(std)
        exact = mpmath.findroot(
            lambda g: (g + 1) / ((g + 2) ** 2 * (g + 3)) - mpmath.mpf(std) ** 2, start
        )
    assert profiles.gamma_from_std(std) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(
    ("std", "gamma"),
    [
        (0.01, 96.99489782370982),
        (0.05, 16.97219860230345),
        (0.10, 6.937203937601807),
        (0.15, 3.557868774899466),
        (0.25, 0.7198239580007095),
    ],
)
def test_exponents_and_widths_are_the_reference_values(std, gamma):
    assert profiles.gamma_from_std(std) == pytest.approx(gamma, rel=1e-12)
    assert profiles.std_from_gamma(gamma) == pytest.approx(std, rel=1e-12)


@given(st.floats(0, 1e6))
def test_the_width_has_the_exponent_that_gave_it(gamma):
    again = profiles.gamma_from_std(profiles.std_from_gamma(gamma))
    assert again == pytest.approx(gamma, rel=1e-12, abs=1e-12)


def test_the_names_of_profiles_are_those_of_widths():
    for name in ("LARGEST_STD", "gamma_from_std", "std_from_gamma"):
        assert getattr(profiles, name) is getattr(widths, name)


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
