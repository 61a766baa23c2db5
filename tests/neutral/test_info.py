"""What a decay means for a run."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ema

BEGINNING = """\
==================================================
EMA CONFIGURATION
==================================================
Decay:                    0.999
Half-life:                693 steps
"""
SCHEDULES = [
    ema.ConstantDecay(decay=0.98),
    ema.HalfLife(steps=100),
    ema.HalfLifeRampup(steps=100, rampup_ratio=0.5),
    ema.InverseGammaWarmup(decay=0.99),
    ema.RampWarmup(decay=0.97),
    ema.ExponentialRamp(decay=0.97, tau=20),
    ema.DebiasedDecay(decay=0.9),
    ema.PowerFunction(gamma=3),
    ema.CosineDecay(start=0.95, total_steps=200),
    ema.UniformAverage(),
]


def rows(description: object) -> dict[str, str]:
    """The table's labels and what stands beside them."""
    lines = str(description).splitlines()
    assert lines[0] == lines[2] == lines[-1] == "=" * 50
    return {line[:26].rstrip(): line[26:] for line in lines[3:-1]}


def test_the_table_begins_as_the_design_says(capsys):
    ema.print_ema_info(0.999, 10_000)
    assert capsys.readouterr().out.startswith(BEGINNING)


def test_the_table_goes_to_the_file_that_is_named():
    file = io.StringIO()
    ema.print_ema_info(0.999, 10_000, file=file)
    assert file.getvalue() == f"{ema.describe_ema(0.999, 10_000)}\n"


def test_the_table_goes_on_with_window_run_share_and_recommendation():
    assert rows(ema.describe_ema(0.999, 10_000)) == {
        "Decay:": "0.999",
        "Half-life:": "693 steps",
        "Averaging window:": "1000 steps",
        "Total steps:": "10000",
        "Half-lives in the run:": "14.4",
        "Initial weights left:": "0.0045 %",
        "Recommended decay:": "0.99930709",
    }


def test_update_every_stretches_the_half_life_of_a_plain_decay_in_steps():
    every, plain = ema.describe_ema(0.999, 10_000, update_every=10), ema.describe_ema(0.999, 10_000)
    assert every.half_life_steps == pytest.approx(10 * plain.half_life_steps)
    assert every.window_steps == pytest.approx(10_000)
    assert every.updates == 1_000
    assert every.initial_share == pytest.approx(0.999**1_000)
    assert every.recommended_decay == ema.compute_optimal_decay(1_000)
    assert rows(every)["Half-life:"] == "6928 steps"
    assert rows(every)["Update every:"] == "10 steps"


def test_update_every_leaves_a_half_life_in_steps_as_it_is():
    description = ema.describe_ema(ema.HalfLife(steps=500), 10_000, update_every=10)
    assert description.half_life_steps == pytest.approx(500, rel=1e-12)
    assert description.half_lives == pytest.approx(20, rel=1e-12)
    assert description.decay == pytest.approx(0.5 ** (10 / 500))
    assert description.window_steps == pytest.approx(10 / (1 - 0.5 ** (10 / 500)))
    assert list(rows(description))[:2] == ["Schedule:", "Decay at the end:"]
    assert rows(description)["Schedule:"] == "HalfLife(steps=500.0)"


@pytest.mark.parametrize("update_every", [1, 7])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_share_of_the_initial_weights_is_what_a_run_leaves_of_them(schedule, update_every):
    """An average that starts at 1 and only ever sees 0."""
    average, total_steps = 1.0, 300
    for count in range(1, total_steps // update_every + 1):
        average += schedule.weight(float(count), update_every) * (0.0 - average)
    description = ema.describe_ema(schedule, total_steps, update_every=update_every)
    assert description.initial_share == pytest.approx(average, rel=1e-10, abs=1e-300)
    halvings = -math.log2(average) if average else math.inf
    assert description.half_lives == pytest.approx(halvings, rel=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_decay_half_life_and_window_are_those_of_the_last_update(schedule):
    description = ema.describe_ema(schedule, 100, update_every=4)
    weight = schedule.weight(25.0, 4)
    assert description.decay == pytest.approx(1 - weight, rel=1e-14)
    assert 4 / description.window_steps == pytest.approx(weight, rel=1e-14)
    assert (1 - weight) ** (description.half_life_steps / 4) == pytest.approx(0.5, rel=1e-10)


def test_a_long_run_counts_all_of_its_half_lives():
    """Also where the share of the initial weights is too small for a float."""
    for decay in (0.5, ema.HalfLife(steps=1)):
        description = ema.describe_ema(decay, 1_000_000)
        assert description.half_lives == pytest.approx(1_000_000)
        assert description.initial_share == 0.0
    ramp = ema.InverseGammaWarmup(decay=0.99)
    logs = np.log1p(-ramp.weight(np.arange(1.0, 300_001.0), 1, np))
    halvings = -logs.sum() / math.log(2)
    assert ema.describe_ema(ramp, 300_000).half_lives == pytest.approx(halvings)


@given(st.floats(0, 1))
def test_the_decay_of_the_table_is_the_one_that_was_given(decay):
    assert ema.describe_ema(decay, 10).decay == decay


def test_a_run_shorter_than_its_first_update_keeps_the_initial_weights():
    for decay in (0.0, 0.999, 1.0, ema.UniformAverage(), ema.HalfLife(steps=3)):
        description = ema.describe_ema(decay, 5, update_every=10)
        assert description.updates == 0
        assert description.initial_share == 1.0
        assert rows(description)["Half-lives in the run:"] == "0.0"
        assert rows(description)["Initial weights left:"] == "100 %"


def test_an_average_that_never_moves_says_so():
    for decay in (1.0, ema.CosineDecay(start=1, end=1, total_steps=5)):
        description = ema.describe_ema(decay, 10)
        assert description.half_life_steps == description.window_steps == math.inf
        assert description.initial_share == 1.0
        table = rows(description)
        assert table["Half-life:"] == "infinite: the average does not move"
        assert table["Half-lives in the run:"] == "0.0"


def test_an_average_that_copies_keeps_nothing():
    description = ema.describe_ema(0.0, 10)
    assert description.half_life_steps == 0.0
    assert description.window_steps == 1.0
    assert description.initial_share == 0.0
    assert description.half_lives == math.inf


def test_a_description_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ema.describe_ema(0.9, 10).decay = 0.5
