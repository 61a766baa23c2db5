"""Combinations of stored averages: reference values, exact sums, and what is refused."""

from __future__ import annotations

import itertools
import re

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ema
from ema.profiles import (
    Checkpoint,
    ExponentialProfile,
    PowerProfile,
    Run,
    UniformProfile,
    combine,
    gamma_from_std,
    posthoc_coefficients,
    profile_of,
)
from ema.profiles.nodes import integral_nodes, sum_nodes
from ema.schedules import EXAMPLES
from tests.own_schedules import Table, Warmup

mpf = mpmath.mpf

STDS = (0.05, 0.10)
RESPONSE = [
    -5.620351079424e-4, 1.944069303755e-3, -1.314786559500e-2, 3.801996663553e-2,
    -7.795837215021e-2, 0.2004086400796, -0.2640619707999, 1.115357567634,
]  # fmt: skip
TAILS = [
    3.799449602524e-3, 6.387686190812e-4, -2.177950013368e-3, 3.737624738317e-2,
    -6.577196747418e-2, 1.974506418816e-1, -2.970479604397e-1, 1.125732770441,
]  # fmt: skip


def pairs(times, last=4096):
    """Both widths at each of so many times, step by step."""
    steps = [last * (index + 1) // times for index in range(times)]
    return np.repeat(steps, 2), np.tile(STDS, times)


def tails_product(a, b):
    """``∫ tail_a · tail_b dτ`` of two power functions, each its time and exponent + 1."""
    (ta, p), (tb, q) = a, b
    m = min(ta, tb)
    x, y = (m / ta) ** p, (m / tb) ** q
    return m * (1 - x / (p + 1) - y / (q + 1) + x * y / (p + q + 1))


def responses_product(a, b):
    """``∫ response_a · response_b dτ``, likewise, as one integral over the shorter run."""
    (ta, p), (tb, q) = a, b
    m = min(ta, tb)
    return p * q / (ta**p * tb**q) * m ** (p + q - 1) / (p + q - 1)


def exact(steps, stds, target_step, target_std, metric):
    """The normal equations, solved with so many digits that their condition does not matter."""
    product = tails_product if metric == "tails" else responses_product
    with mpmath.workdps(70):
        powers = {std: mpf(gamma_from_std(std)) + 1 for std in (*stds, target_std)}
        # Newton steps give the exponents as many digits as the solution
        powers = {
            std: mpmath.findroot(lambda p, s=std: p / ((p + 1) ** 2 * (p + 2)) - mpf(s) ** 2, p)
            for std, p in powers.items()
        }
        sources = [(mpf(int(t)), powers[s]) for t, s in zip(steps, stds, strict=True)]
        target, number = (mpf(target_step), powers[target_std]), len(sources)
        border = int(metric == "tails")  # the constraint and its multiplier
        gram = mpmath.ones(number + border)
        wanted = mpmath.ones(number + border, 1)
        for i, a in enumerate(sources):
            wanted[i] = product(a, target)
            for j, b in enumerate(sources[: i + 1]):
                gram[i, j] = gram[j, i] = product(a, b)
        if border:
            gram[number, number] = 0
        found = mpmath.lu_solve(gram, wanted)
        found = [found[i] for i in range(number)]
        return np.array([float(c / sum(found)) for c in found])


@pytest.mark.parametrize("scale", [1, 1000, 0.37])
def test_the_coefficients_of_the_paper_are_the_reference_values(scale):
    steps, stds = pairs(4, 4)
    found = posthoc_coefficients(steps * scale, stds, 4 * scale, 0.15, metric="response")
    np.testing.assert_allclose(found, RESPONSE, rtol=1e-9)


@pytest.mark.parametrize("scale", [1, 1000, 0.37])
def test_the_coefficients_of_tails_are_the_reference_values(scale):
    steps, stds = pairs(4, 4)
    found = posthoc_coefficients(steps * scale, stds, 4 * scale, 0.15)
    np.testing.assert_allclose(found, TAILS, rtol=1e-9)


@pytest.mark.parametrize("metric", ["tails", "response"])
@pytest.mark.parametrize(
    ("times", "target"), [(8, 0.01), (8, 0.25), (16, 0.15), (32, 0.03), (64, 0.15)]
)
def test_coefficients_agree_with_seventy_digits_up_to_64_times(times, target, metric):
    steps, stds = pairs(times)
    found = posthoc_coefficients(steps, stds, 4096, target, metric=metric)
    np.testing.assert_allclose(found, exact(steps, stds, 4096, target, metric), rtol=0, atol=1e-9)


@pytest.mark.parametrize("metric", ["tails", "response"])
def test_the_order_of_the_pairs_is_that_of_the_coefficients(metric):
    steps, stds = pairs(8)
    order = np.random.default_rng(0).permutation(16)
    found = posthoc_coefficients(steps, stds, 4096, 0.2, metric=metric)
    shuffled = posthoc_coefficients(list(steps[order]), list(stds[order]), 4096, 0.2, metric=metric)
    np.testing.assert_allclose(shuffled, found[order], rtol=0, atol=1e-11)


@pytest.mark.parametrize("metric", ["tails", "response"])
def test_snapshots_past_the_target_have_coefficient_zero(metric):
    steps, stds = pairs(8)
    found = posthoc_coefficients(steps, stds, 2100, 0.2, metric=metric)
    assert found[steps > 2100].tolist() == [0.0] * 8
    alone = posthoc_coefficients(steps[:8], stds[:8], 2048, 0.2, metric=metric)
    at = posthoc_coefficients(steps, stds, 2048, 0.2, metric=metric)
    np.testing.assert_array_equal(at[:8], alone)
    assert found.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("metric", ["tails", "response"])
def test_a_target_that_was_tracked_is_that_snapshot(metric):
    steps, stds = pairs(8)
    for index in (0, 5, 15):
        found = posthoc_coefficients(steps, stds, steps[index], stds[index], metric=metric)
        assert found.tolist() == np.eye(16)[index].tolist()


@given(
    st.lists(st.integers(1, 10_000), min_size=2, max_size=12, unique=True),
    st.floats(0.01, 0.28),
    st.sampled_from(["tails", "response"]),
)
def test_coefficients_are_finite_and_sum_to_one(steps, std, metric):
    steps = sorted(steps)
    found = posthoc_coefficients(steps, [0.1] * len(steps), steps[-1], std, metric=metric)
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(1, abs=1e-6)


def test_tails_are_closer_than_the_paper_to_the_target_of_tails():
    steps, stds = pairs(16)
    sources = [PowerProfile.from_std(s, t) for t, s in zip(steps, stds, strict=True)]
    target = PowerProfile.from_std(0.2, 4096)
    times, weights = integral_nodes([float(step) for step in steps])
    tails = np.stack([source.tail_at(times) for source in sources], axis=1)

    def distance(coefficients):
        return np.sqrt((weights * (tails @ coefficients - target.tail_at(times)) ** 2).sum())

    ours = distance(posthoc_coefficients(steps, stds, 4096, 0.2))
    theirs = distance(posthoc_coefficients(steps, stds, 4096, 0.2, metric="response"))
    assert 2 * ours < theirs
    size = np.sqrt((weights * target.tail_at(times) ** 2).sum())
    told = combine(sources, target, continuous=True)
    assert told.residual == pytest.approx(ours / size, rel=1e-9)
    norm = np.sqrt((told.coefficients**2).sum())
    assert told.storage_error == pytest.approx(norm * 2.0**-24, rel=1e-12)


def dense(sources, target):
    """The least squares over all steps: a matrix of steps × sources."""
    length = target.step
    tails = np.stack([np.pad(s.tail[1:], (0, length - s.step)) for s in sources], axis=1)
    last = tails[:, -1]
    others, *_ = np.linalg.lstsq(tails[:, :-1] - last[:, None], target.tail[1:] - last, rcond=None)
    found = np.append(others, 1 - others.sum())
    return found, np.linalg.norm(tails @ found - target.tail[1:]) / np.linalg.norm(target.tail[1:])


@pytest.mark.parametrize("last", [64, 800, 4000, 40_001])
@pytest.mark.parametrize("std", [0.01, 0.2])
def test_combinations_of_power_functions_are_those_of_a_sum_over_all_steps(last, std):
    runs = [Run(ema.PowerFunction.from_std(width), last) for width in STDS]
    sources = [run.at(last * (index + 1) // 16) for index in range(16) for run in runs]
    target = profile_of(ema.PowerFunction.from_std(std), last)
    found = combine(sources, target)
    coefficients, residual = dense(sources, target)
    np.testing.assert_allclose(found.coefficients, coefficients, rtol=0, atol=1e-9)
    assert found.residual == pytest.approx(residual, rel=1e-9)
    assert found.initial_share == 0.0


@pytest.mark.parametrize(
    "schedule", [*EXAMPLES, Warmup(0.999, 100), Table((0.5, 0.9, 0.99))], ids=str
)
def test_combinations_of_any_schedule_are_those_of_a_sum_over_all_steps(schedule):
    last = 4000
    runs = Run(schedule, last), Run(ema.HalfLife(steps=400), last)
    sources = [run.at(last * (index + 1) // 8) for index in range(8) for run in runs]
    target = profile_of(ema.PowerFunction.from_std(0.2), last)
    found = combine(sources, target)
    coefficients, residual = dense(sources, target)
    np.testing.assert_allclose(found.coefficients, coefficients, rtol=0, atol=1e-5)
    assert found.residual == pytest.approx(residual, rel=1e-4)


@pytest.mark.parametrize("half_life", [1, 5, 50])
def test_a_memory_of_few_steps_between_distant_snapshots_is_not_missed(half_life):
    last = 100_000
    runs = Run(ema.HalfLife(steps=20), last), Run(ema.HalfLife(steps=200), last)
    sources = [run.at(last * (index + 1) // 8) for index in range(8) for run in runs]
    target = profile_of(ema.HalfLife(steps=half_life), last)
    found = combine(sources, target)
    coefficients, residual = dense(sources, target)
    np.testing.assert_allclose(found.coefficients, coefficients, rtol=0, atol=1e-5)
    assert found.residual == pytest.approx(residual, rel=1e-9)


def test_two_plain_averages_reach_a_power_function():
    last = 4000
    runs = Run(ema.HalfLife(steps=80), last), Run(ema.HalfLife(steps=400), last)
    sources = [Checkpoint(0)]
    sources += [run.at(last * (index + 1) // 16) for index in range(16) for run in runs]
    target = profile_of(ema.PowerFunction.from_std(0.2), last)
    found = combine(sources, target)
    assert found.coefficients[0] != 0.0
    assert found.residual < 1e-3
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-12)
    shares = [source.initial_share for source in sources]
    assert found.initial_share == pytest.approx(found.coefficients @ shares, abs=1e-15)


def test_initial_weights_take_part_only_where_something_has_a_share_of_them():
    run = Run(ema.PowerFunction.from_std(0.1), 800)
    powers = [run.at(step) for step in (200, 400, 600, 800)]
    target = profile_of(ema.PowerFunction.from_std(0.2), 800)
    found = combine([Checkpoint(0), *powers], target)
    assert found.coefficients[0] == 0.0
    np.testing.assert_array_equal(found.coefficients[1:], combine(powers, target).coefficients)
    plain = combine([Checkpoint(0), *powers], profile_of(ema.HalfLife(steps=400), 800))
    assert plain.coefficients[0] > 0.1
    assert plain.initial_share == pytest.approx(plain.coefficients[0])
    forgotten = combine([Checkpoint(0), *powers], profile_of(ema.HalfLife(steps=20), 800))
    assert forgotten.coefficients[0] == 0.0  # 2^(−40) of them: float32 has no room for it


def test_checkpoints_give_a_mean_of_the_last_part_their_intervals():
    sources = [Checkpoint(step) for step in (800, 850, 900, 950, 1000)]
    target = profile_of(ema.UniformAverage(), 1000, update_after_step=800)
    found = combine(sources, target)
    np.testing.assert_allclose(found.coefficients, dense_checkpoints(sources, target), atol=1e-12)


def dense_checkpoints(sources, target):
    """Best coefficients of checkpoints: each tail between two of them is its mean there."""
    edges = [source.step for source in sources]
    means = [target.tail[1:][a:b].mean() for a, b in itertools.pairwise(edges)]
    return -np.diff([1.0, *means, 0.0])


@pytest.mark.parametrize("schedule", [*EXAMPLES, Warmup(0.99, 20)], ids=str)
def test_a_source_that_is_the_target_is_the_whole_combination(schedule):
    run = Run(schedule, 800)
    sources = [Checkpoint(0), run.at(400), run.at(600), run.at(800)]
    found = combine(sources, Run(schedule, 800).at(600))
    assert found.coefficients.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert found.residual == 0.0


def test_closed_targets_can_be_reached_from_closed_sources():
    sources = [UniformProfile(0.5, 4), PowerProfile(2, 4), ExponentialProfile(1, 4), Checkpoint(0)]
    found = combine(sources, ExponentialProfile(1.1, 4), continuous=True)
    assert found.residual < 0.03
    assert combine(sources, sources[2], continuous=True).coefficients.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("steps", [1, 39, 40, 41, 60, 1000, 1024, 1025, 10**6])
def test_sums_over_steps_are_exact_for_polynomials(steps):
    times, weights = sum_nodes([steps])
    assert weights.sum() == pytest.approx(steps, rel=1e-13)
    assert times.min() > 0
    assert times.max() < steps
    every = (np.arange(steps) + 0.5) / steps
    for power in (1, 7, 40, 79):
        expected = (every**power).sum()
        assert (weights * (times / steps) ** power).sum() == pytest.approx(expected, rel=1e-12)


def test_short_pieces_have_a_node_at_each_step():
    times, weights = sum_nodes([4, 20, 50])
    np.testing.assert_allclose(times, np.arange(50) + 0.5, atol=0)
    assert (weights == 1).all()


def test_the_first_interval_is_halved_eight_times():
    times, weights = integral_nodes([256.0, 300.0])
    assert len(times) == 40 * 10
    counts, _ = np.histogram(times, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300])
    assert counts.tolist() == [40] * 10
    assert (weights * np.sqrt(times)).sum() == pytest.approx(2 / 3 * 300**1.5, rel=1e-9)


def test_the_cost_does_not_grow_with_the_steps():
    """A matrix of 2^40 steps would fit into no memory."""
    last = 2**40
    run = Run(ema.PowerFunction.from_std(0.1), last)
    found = combine(
        [run.at(last // 4), run.at(last // 2), run.at(last)],
        profile_of(ema.PowerFunction.from_std(0.2), last),
    )
    expected = posthoc_coefficients([1, 2, 4], [0.1] * 3, 4, 0.2)
    np.testing.assert_allclose(found.coefficients, expected, atol=1e-9)


GOOD = {"steps": [1, 2, 3], "stds": [0.1, 0.1, 0.1], "target_step": 3, "target_std": 0.2}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"steps": 3}, ema.ArgumentTypeError, "`steps` must be a sequence of numbers, got 3 (int)"),
        ({"stds": "0.1"}, ema.ArgumentTypeError, "`stds` must be a sequence of numbers, got '0.1'"),
        (
            {"stds": [0.1]},
            ema.ArgumentError,
            "`stds` must have one entry for each of `steps` (3), got 1",
        ),
        (
            {"steps": [], "stds": []},
            ema.ArgumentError,
            "`steps` must hold at least two snapshots, got 0",
        ),
        ({"steps": [1, 0, 3]}, ema.ArgumentError, "`steps[1]` must be positive, got 0.0"),
        (
            {"steps": [1, None, 3]},
            ema.ArgumentTypeError,
            "`steps[1]` must be a real number, got None",
        ),
        ({"stds": [0.1, 0.1, 0.3]}, ema.ArgumentError, "`stds[2]` must not exceed 0.2887"),
        ({"stds": [0.1, 0.1, -1]}, ema.ArgumentError, "`stds[2]` must be positive, got -1.0"),
        ({"target_std": 0.3}, ema.ArgumentError, "`target_std` must not exceed 0.2887"),
        ({"target_std": float("nan")}, ema.ArgumentError, "`target_std` must be finite, got nan"),
        ({"target_step": 0}, ema.ArgumentError, "`target_step` must be positive, got 0.0"),
        (
            {"target_step": 3.5},
            ema.ArgumentError,
            "`target_step` must not exceed the last of `steps` (3), got 3.5",
        ),
        (
            {"target_step": 1.5},
            ema.ArgumentError,
            "`steps` must hold at least two snapshots up to `target_step` (1.5), got 1",
        ),
        (
            {"steps": [1, 3, 3]},
            ema.ArgumentError,
            "each pair of `steps` and `stds` must be there once, got step 3 with std 0.1 twice",
        ),
        (
            {"metric": "mse"},
            ema.ArgumentError,
            "`metric` must be 'tails' or 'response', got 'mse'",
        ),
        (
            {"metric": ["tails"]},
            ema.ArgumentError,
            "`metric` must be 'tails' or 'response', got ['tails']",
        ),
    ],
)
def test_a_wrong_argument_is_refused_with_name_rule_and_value(wrong, error, message):
    with pytest.raises(error, match=re.escape(message)):
        posthoc_coefficients(**{**GOOD, **wrong})


@pytest.mark.parametrize(
    ("sources", "target", "message"),
    [
        (
            [],
            Checkpoint(1),
            "`target` must not be later than the last of `sources` (step 0), got step 1",
        ),
        (
            [Checkpoint(1), Checkpoint(2)],
            Checkpoint(3),
            "`target` must not be later than the last of `sources` (step 2), got step 3",
        ),
        (
            [Checkpoint(0), Checkpoint(2), Checkpoint(4)],
            profile_of(ema.UniformAverage(), 3),
            "`sources` must hold at least two that can take part up to step 3 of `target`, got 1",
        ),
        (
            [PowerProfile(1, 1.5), PowerProfile(1, 2)],
            PowerProfile(2, 2),
            "a comparison over steps needs profiles of whole steps, got 1.5: pass `continuous=True`",
        ),
    ],
)
def test_sources_that_cannot_make_the_target_are_refused(sources, target, message):
    with pytest.raises(ema.ArgumentError, match=re.escape(message)):
        combine(sources, target)
