"""The memory of averages: responses, tails, ages and widths."""

from __future__ import annotations

import math
import re

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
    profile_of,
)
from ema.schedules import EXAMPLES
from tests.own_schedules import Answers, Table, Warmup

OWN = (Warmup(0.99, 20), Table((0.5, 0.9, 1.0, 0.0, 0.7)))
COPYING = (ema.ConstantDecay(decay=0.0), ema.ConstantDecay(decay=1.0), Table((0.5, 0.0, 0.9)))
ALL = (*EXAMPLES, *OWN, *COPYING)
TIMINGS = [
    {},
    {"update_every": 3},
    {"update_after_step": 7},
    {"update_every": 4, "update_after_step": 2},
]
STEPS = 60


def name_of(schedule):
    return type(schedule).__name__


def timing_of(timing):
    return "-".join(f"{name}={value}" for name, value in timing.items()) or "default"


def measured(schedule, steps, timing):
    """The averages of one-hot parameters: element i counts what is left of the params of step i."""
    import torch

    from ema import EMAModel

    model = torch.nn.Linear(steps + 1, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(steps + 1)[0])
        average = EMAModel(model, schedule, **timing)
        for step in range(1, steps + 1):
            model.weight.copy_(torch.eye(steps + 1)[step])
            average.update()
    with average.use_ema():
        return model.weight.detach().double().numpy().ravel().copy()


@pytest.mark.parametrize("timing", TIMINGS, ids=timing_of)
@pytest.mark.parametrize("schedule", ALL, ids=name_of)
@pytest.mark.parametrize("steps", [STEPS, 5, 1])
def test_the_response_is_what_an_average_of_one_hot_parameters_holds(schedule, timing, steps):
    response = profile_of(schedule, steps, **timing).response
    np.testing.assert_allclose(response, measured(schedule, steps, timing), rtol=0, atol=1e-6)


@pytest.mark.parametrize("timing", TIMINGS, ids=timing_of)
@pytest.mark.parametrize("schedule", ALL, ids=name_of)
@pytest.mark.parametrize("steps", [10_000, STEPS, 5, 1])
def test_the_response_sums_to_one_and_the_tail_sums_it_from_the_end(schedule, timing, steps):
    profile = profile_of(schedule, steps, **timing)
    assert profile.response.shape == profile.tail.shape == (steps + 1,)
    assert profile.response.min() >= 0
    assert profile.response.sum() == pytest.approx(1, abs=1e-12)
    assert profile.tail[0] == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(-np.diff(profile.tail, append=0), profile.response, atol=1e-14)
    assert profile.initial_share == pytest.approx(profile.response[0], abs=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=name_of)
def test_a_run_tells_the_profile_of_each_of_its_steps(schedule):
    run = Run(schedule, 50, update_every=3, update_after_step=4)
    for step in range(1, 51):
        alone = profile_of(schedule, step, update_every=3, update_after_step=4)
        np.testing.assert_allclose(run.at(step).response, alone.response, atol=1e-14)


@pytest.mark.parametrize("after", [0, 7])
@pytest.mark.parametrize("schedule", ALL, ids=name_of)
def test_the_tail_at_the_middle_of_a_step_is_the_tail_of_the_step(schedule, after):
    profile = Run(schedule, 200, update_after_step=after).at(150)
    steps = np.arange(1.0, 201.0)
    expected = np.pad(profile.tail[1:], (0, 50))
    np.testing.assert_allclose(profile.tail_at(steps - 0.5), expected, atol=1e-13)


@pytest.mark.parametrize("schedule", [ema.HalfLife(steps=90), ema.UniformAverage(), *OWN])
def test_the_tail_of_rare_updates_passes_through_the_middle_of_each_stair(schedule):
    profile = Run(schedule, 200, update_every=5, update_after_step=8).at(151)
    middles = np.arange(8 + 3, 148, 5)  # of the steps 9 to 13, 14 to 18, …
    np.testing.assert_allclose(profile.tail_at(middles - 0.5), profile.tail[middles], atol=1e-13)
    assert profile.tail_at(np.array([3.0, 8.0])).tolist() == [1.0, 1.0]
    assert profile.tail_at(np.array([148.5, 150.5])).tolist() == [0.0, 0.0]
    assert 148.0 in profile.breaks


def test_an_array_of_times_between_steps_lies_between_their_tails():
    profile = Run(Warmup(0.99, 20), 200).at(150)
    tails = profile.tail_at(np.arange(1.0, 150.0))
    assert (np.diff(tails) <= 0).all()
    assert ((tails <= profile.tail[1:150]) & (tails >= profile.tail[2:151])).all()


@pytest.mark.parametrize("schedule", [*EXAMPLES, *OWN], ids=name_of)
def test_age_and_width_are_the_moments_of_the_response(schedule):
    profile = profile_of(schedule, 500, update_every=2, update_after_step=3)
    steps = np.arange(501)
    mean = (profile.response * steps).sum()
    assert profile.mean_age == pytest.approx(500 - mean, abs=1e-9)
    assert profile.mean_age == pytest.approx((1 - profile.tail[1:]).sum(), abs=1e-9)
    variance = (profile.response * (steps - mean) ** 2).sum()
    assert profile.relative_width == pytest.approx(math.sqrt(variance) / 500, rel=1e-12)


@pytest.mark.parametrize("std", [0.03, 0.1, 0.25])
def test_a_long_run_of_a_power_function_has_the_width_of_its_name(std):
    profile = profile_of(ema.PowerFunction.from_std(std), 20_000)
    assert profile.relative_width == pytest.approx(std, rel=1e-6)
    closed = PowerProfile.from_std(std, 20_000)
    assert profile.mean_age == pytest.approx(closed.mean_age - 0.5, rel=1e-6)


def moments(profile):
    """Share of the initial weights, mean age and relative width, integrated over time."""
    from ema.profiles.nodes import integral_nodes

    times, weights = integral_nodes(profile.breaks)
    shares = weights * profile.response_at(times)
    ages = profile.step - times
    mean = (shares * ages).sum() + profile.initial_share * profile.step
    variance = (shares * (ages - mean) ** 2).sum()
    variance += profile.initial_share * (profile.step - mean) ** 2
    return 1 - shares.sum(), mean, math.sqrt(variance) / profile.step


CLOSED = [
    PowerProfile(0, 100),
    PowerProfile(0.5, 3),
    PowerProfile.from_std(0.05, 1e6),
    ExponentialProfile(10, 100),
    ExponentialProfile(100, 100),
    ExponentialProfile(140, 100),
    ExponentialProfile(1e5, 100),
    UniformProfile(0.2, 100),
    UniformProfile(1, 50),
]


@pytest.mark.parametrize("profile", CLOSED, ids=str)
def test_a_closed_profile_has_the_moments_of_its_response(profile):
    share, mean, width = moments(profile)
    assert profile.initial_share == pytest.approx(share, abs=1e-8)
    assert profile.mean_age == pytest.approx(mean, rel=1e-8)
    assert profile.relative_width == pytest.approx(width, rel=1e-8)


@pytest.mark.parametrize("profile", CLOSED, ids=str)
def test_the_tail_of_a_closed_profile_is_the_integral_of_its_response(profile):
    from ema.profiles.nodes import integral_nodes

    for time in np.array([0.1, 0.5, 0.85, 0.99]) * profile.step:
        times, weights = integral_nodes([time, *profile.breaks])
        later = (weights * profile.response_at(times))[times > time].sum()
        assert profile.tail_at(np.array([time]))[0] == pytest.approx(later, rel=1e-12)
    past = np.array([1.0, 1.1]) * profile.step
    assert profile.tail_at(past).tolist() == [0.0, 0.0]
    assert profile.response_at(past[1:]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("closed", "schedule", "timing"),
    [
        (PowerProfile.from_std(0.2, 3000), ema.PowerFunction.from_std(0.2), {}),
        (ExponentialProfile(700, 3000), ema.HalfLife(steps=700), {}),
        (UniformProfile(0.2, 3000), ema.UniformAverage(), {"update_after_step": 2400}),
    ],
    ids=str,
)
def test_a_closed_profile_is_that_of_its_schedule_at_the_start_of_each_step(
    closed, schedule, timing
):
    run = profile_of(schedule, 3000, **timing)
    np.testing.assert_allclose(run.tail[1:], closed.tail_at(np.arange(3000.0)), atol=1e-12)
    assert run.initial_share == pytest.approx(closed.initial_share, rel=1e-12)


def test_a_checkpoint_contains_all_movement_up_to_its_step():
    times = np.array([0.5, 6.5, 7.5])
    assert Checkpoint(7).tail_at(times).tolist() == [1.0, 1.0, 0.0]
    assert Checkpoint(0).tail_at(times).tolist() == [0.0, 0.0, 0.0]
    assert (Checkpoint(7).initial_share, Checkpoint(0).initial_share) == (0.0, 1.0)
    assert (Checkpoint(7).breaks, Checkpoint(0).breaks) == ((7.0,), ())


def test_a_schedule_is_asked_once_for_all_profiles_of_a_run():
    asked = []

    class Counted(ema.Schedule):
        def weight(self, count, span=1, xp=None):
            asked.append(np.size(count))
            return xp.maximum(0.01, xp.exp(-count / 30))

    run = Run(Counted(), 10_000)
    for step in range(1000, 10_001, 1000):
        run.at(step).tail_at(np.arange(0.5, step))
    assert sum(asked) < 11_000
    assert run._table is run._table


def test_a_schedule_with_a_formula_needs_no_table_of_its_steps():
    run = Run(ema.PowerFunction.from_std(0.1), 10**15)
    times = np.array([0.25, 0.5, 0.75]) * 10**15
    expected = PowerProfile.from_std(0.1, 10**15).tail_at(times)
    np.testing.assert_allclose(run.at(10**15).tail_at(times), expected, rtol=1e-12)
    assert "_table" not in vars(run)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.integers(1, 3), st.integers(0, 4))
def test_any_decays_give_the_profile_of_the_recurrence(decays, every, after):
    steps = 20
    average = np.eye(steps + 1)[0]
    for step in range(1, steps + 1):
        now = np.eye(steps + 1)[step]
        if step <= after:
            average = now
        elif (step - after) % every == 0:
            decay = decays[min((step - after) // every, len(decays)) - 1]
            average = decay * average + (1 - decay) * now
    profile = profile_of(Table(decays), steps, update_every=every, update_after_step=after)
    np.testing.assert_allclose(profile.response, average, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: profile_of(1.5, 9), ema.ArgumentError, "`decay` must lie in [0, 1], got 1.5"),
        (
            lambda: profile_of("a", 9),
            ema.ArgumentTypeError,
            "`decay` must be a number in [0, 1] or",
        ),
        (lambda: Run(None, 9), ema.ArgumentTypeError, "`schedule` must be a number in [0, 1] or a"),
        (lambda: profile_of(0.5, 0), ema.ArgumentError, "`steps` must be at least 1, got 0"),
        (
            lambda: profile_of(0.5, 2.0),
            ema.ArgumentTypeError,
            "`steps` must be an integer, got 2.0",
        ),
        (
            lambda: profile_of(0.5, 9, update_every=0),
            ema.ArgumentError,
            "`update_every` must be at least 1, got 0",
        ),
        (
            lambda: profile_of(0.5, 9, update_after_step=-1),
            ema.ArgumentError,
            "`update_after_step` must be at least 0, got -1",
        ),
        (
            lambda: Run(0.5, 9).at(10),
            ema.ArgumentError,
            "`step` must not exceed the run's 9, got 10",
        ),
        (lambda: Run(0.5, 9).at(0), ema.ArgumentError, "`step` must be at least 1, got 0"),
        (
            lambda: profile_of(Answers(1.5, at=7), 9).response,
            ema.ArgumentError,
            "must lie in [0, 1], got 1.5 at update 7",
        ),
        (lambda: PowerProfile(-1, 9), ema.ArgumentError, "`gamma` must not be negative, got -1.0"),
        (lambda: PowerProfile(1, 0), ema.ArgumentError, "`step` must be positive, got 0.0"),
        (
            lambda: PowerProfile.from_std(0.3, 9),
            ema.ArgumentError,
            "`std` must not exceed 0.2887, the width of the uniform average, got 0.3",
        ),
        (
            lambda: ExponentialProfile(0, 9),
            ema.ArgumentError,
            "`half_life` must be positive, got 0.0",
        ),
        (
            lambda: ExponentialProfile(1, math.nan),
            ema.ArgumentError,
            "`step` must be finite, got nan",
        ),
        (lambda: UniformProfile(1.5, 9), ema.ArgumentError, "`last` must lie in (0, 1], got 1.5"),
        (lambda: UniformProfile(0, 9), ema.ArgumentError, "`last` must be positive, got 0.0"),
        (lambda: UniformProfile(1, -2), ema.ArgumentError, "`step` must be positive, got -2.0"),
        (lambda: Checkpoint(-1), ema.ArgumentError, "`step` must be at least 0, got -1"),
        (lambda: Checkpoint(1.5), ema.ArgumentTypeError, "`step` must be an integer, got 1.5"),
    ],
)
def test_a_wrong_argument_is_refused_with_name_rule_and_value(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
