"""Every public function refuses what it is not defined for, naming argument, rule and value."""

from __future__ import annotations

import fractions
import math

import numpy as np
import pytest

import ema
from ema import profiles, validate

BELOW_0 = math.nextafter(0.0, -1.0)
ABOVE_1 = math.nextafter(1.0, 2.0)

NOT_FINITE = [math.nan, math.inf, -math.inf, 10**400, -(10**400), np.float32("nan")]
NOT_REAL = [True, np.True_, "0.9", None, [0.5], 1j, np.array([0.5])]
OUTSIDE = {
    "fraction": [-0.1, 1.1, BELOW_0, ABOVE_1, 2],
    "positive": [0, 0.0, -0.0, -3.0, BELOW_0],
    "positive or infinite": [0, 0.0, -0.0, -3.0, BELOW_0],
    "non_negative": [-1, -3.0, BELOW_0],
    "at least 1": [0, -1],
}
NOT_INTEGER = [*NOT_REAL, 1.0, 2.5, math.nan, math.inf, fractions.Fraction(1, 2)]

# what is called with the bad value, the argument that the error names, and its rule
REAL_ARGUMENTS = {
    "validate.fraction": (lambda v: validate.fraction("x", v), "x", "fraction"),
    "validate.positive": (lambda v: validate.positive("x", v), "x", "positive"),
    "validate.positive_or_infinite": (
        lambda v: validate.positive_or_infinite("x", v),
        "x",
        "positive or infinite",
    ),
    "validate.non_negative": (lambda v: validate.non_negative("x", v), "x", "non_negative"),
    "decay_from_half_life": (ema.decay_from_half_life, "half_life", "positive"),
    "half_life_from_decay": (ema.half_life_from_decay, "decay", "fraction"),
    "window_from_decay": (ema.window_from_decay, "decay", "fraction"),
    "scale_decay, decay": (lambda v: ema.scale_decay(v, 2), "decay", "fraction"),
    "scale_decay, ratio": (lambda v: ema.scale_decay(0.9, v), "ratio", "positive"),
    "compute_optimal_decay": (ema.compute_optimal_decay, "total_steps", "positive"),
    "compute_optimal_decay, half-life": (
        lambda v: ema.compute_optimal_decay(10, [] if v is None else v),  # None asks for a tenth
        "target_half_life_steps",
        "positive",
    ),
    "describe_ema": (lambda v: ema.describe_ema(v, 10), "decay", "fraction"),
    "print_ema_info": (lambda v: ema.print_ema_info(v, 10), "decay", "fraction"),
    "std_from_gamma": (profiles.std_from_gamma, "gamma", "non_negative"),
    "gamma_from_std": (profiles.gamma_from_std, "std", "positive"),
    "ConstantDecay.decay": (lambda v: ema.ConstantDecay(decay=v), "decay", "fraction"),
    "HalfLife.steps": (lambda v: ema.HalfLife(steps=v), "steps", "positive"),
    "HalfLifeRampup.steps": (
        lambda v: ema.HalfLifeRampup(steps=v),
        "steps",
        "positive or infinite",
    ),
    "HalfLifeRampup.rampup_ratio": (
        lambda v: ema.HalfLifeRampup(steps=9, rampup_ratio=v),
        "rampup_ratio",
        "positive",
    ),
    "InverseGammaWarmup.decay": (lambda v: ema.InverseGammaWarmup(decay=v), "decay", "fraction"),
    "InverseGammaWarmup.inv_gamma": (
        lambda v: ema.InverseGammaWarmup(decay=0.9, inv_gamma=v),
        "inv_gamma",
        "positive",
    ),
    "InverseGammaWarmup.power": (
        lambda v: ema.InverseGammaWarmup(decay=0.9, power=v),
        "power",
        "positive",
    ),
    "InverseGammaWarmup.min_decay": (
        lambda v: ema.InverseGammaWarmup(decay=1.0, min_decay=v),
        "min_decay",
        "fraction",
    ),
    "ExponentialRamp.decay": (
        lambda v: ema.ExponentialRamp(decay=v, tau=9),
        "decay",
        "fraction",
    ),
    "ExponentialRamp.tau": (
        lambda v: ema.ExponentialRamp(decay=0.9, tau=v),
        "tau",
        "positive",
    ),
    "RampWarmup.decay": (lambda v: ema.RampWarmup(decay=v), "decay", "fraction"),
    "DebiasedDecay.decay": (lambda v: ema.DebiasedDecay(decay=v), "decay", "fraction"),
    "PowerFunction.gamma": (lambda v: ema.PowerFunction(gamma=v), "gamma", "non_negative"),
    "PowerFunction.from_std": (ema.PowerFunction.from_std, "std", "positive"),
    "CosineDecay.start": (
        lambda v: ema.CosineDecay(start=v, total_steps=9),
        "start",
        "fraction",
    ),
    "CosineDecay.end": (
        lambda v: ema.CosineDecay(start=0.9, end=v, total_steps=9),
        "end",
        "fraction",
    ),
    "CosineDecay.total_steps": (
        lambda v: ema.CosineDecay(start=0.9, total_steps=v),
        "total_steps",
        "positive",
    ),
}
INTEGER_ARGUMENTS = {
    "validate.integer": (lambda v: validate.integer("x", v, 1), "x", "at least 1"),
    "describe_ema, total_steps": (
        lambda v: ema.describe_ema(0.9, v),
        "total_steps",
        "at least 1",
    ),
    "describe_ema, update_every": (
        lambda v: ema.describe_ema(0.9, 10, update_every=v),
        "update_every",
        "at least 1",
    ),
}
RULE_WORDS = {
    "fraction": "must lie in [0, 1]",
    "positive": "must be positive",
    "positive or infinite": "must be positive",
    "non_negative": "must not be negative",
    "at least 1": "must be at least 1",
}
ARGUMENTS = {**REAL_ARGUMENTS, **INTEGER_ARGUMENTS}


def cases(*, types: bool) -> list:
    found = []
    for label, (call, name, rule) in ARGUMENTS.items():
        if types:
            bad = NOT_INTEGER if label in INTEGER_ARGUMENTS else NOT_REAL
        else:
            bad = OUTSIDE[rule] + (NOT_FINITE if label in REAL_ARGUMENTS else [])
            if rule == "positive or infinite":
                bad = [value for value in bad if value != math.inf]
        for value in bad:
            shown = repr(value) if len(repr(value)) < 30 else f"{str(value)[:5]}…"
            found.append(pytest.param(call, name, rule, value, id=f"{label} = {shown}"))
    return found


@pytest.mark.parametrize(("call", "name", "rule", "value"), cases(types=False))
def test_a_value_out_of_range_is_refused_with_name_rule_and_value(call, name, rule, value):
    with pytest.raises(ema.ArgumentError) as caught:
        call(value)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    if isinstance(value, int):
        shown = str(value) if abs(value) < 1e300 else "inf"
        assert message.endswith((shown, f"{shown}.0"))
    else:
        assert message.endswith(f"got {float(value)}")
    finite = abs(value) < math.inf and abs(value) < 1e300
    assert message.startswith(f"`{name}` {RULE_WORDS[rule] if finite else 'must be finite'}")


@pytest.mark.parametrize(("call", "name", "rule", "value"), cases(types=True))
def test_a_value_of_the_wrong_type_is_refused_with_name_rule_and_value(call, name, rule, value):
    with pytest.raises(ema.ArgumentTypeError) as caught:
        call(value)
    message = str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert message.startswith(f"`{name}` must be a")
    if value is not None:
        assert f"{value!r} ({type(value).__name__})" in message


@pytest.mark.parametrize(
    "value", [1, np.int64(1), np.float32(1), np.float64(1), fractions.Fraction(1)]
)
def test_numbers_of_other_types_become_plain_floats(value):
    for check in (validate.real, validate.fraction, validate.positive, validate.non_negative):
        checked = check("x", value)
        assert type(checked) is float
        assert checked == 1.0
    schedule = ema.ConstantDecay(decay=value)
    assert type(schedule.decay) is float


def test_integers_of_other_types_become_plain_integers():
    assert type(validate.integer("x", np.int64(3), 1)) is int


@pytest.mark.parametrize("value", [0.0, 1.0, 0, 1, 5e-324])
def test_the_ends_of_a_range_belong_to_it(value):
    assert validate.fraction("x", value) == value
    assert validate.non_negative("x", value) == value


def test_a_std_wider_than_the_uniform_average_is_refused():
    for call in (profiles.gamma_from_std, ema.PowerFunction.from_std):
        with pytest.raises(ema.ArgumentError, match=r"`std` must not exceed 0\.2887.*got 0\.3$"):
            call(0.3)


def test_a_min_decay_above_the_decay_is_refused():
    with pytest.raises(
        ema.ArgumentError, match=r"`min_decay` must not exceed `decay` \(0\.5\), got 0\.6$"
    ):
        ema.InverseGammaWarmup(decay=0.5, min_decay=0.6)


def test_a_debiased_decay_of_one_is_refused_and_its_limit_named():
    with pytest.raises(ema.ArgumentError, match=r"`decay` must be below 1, got 1\.0: .*Uniform"):
        ema.DebiasedDecay(decay=1)


def test_a_schedule_given_as_its_class_is_refused():
    with pytest.raises(ema.ArgumentTypeError, match="got the class HalfLife"):
        ema.describe_ema(ema.HalfLife, 10)


def test_a_callable_is_no_schedule():
    with pytest.raises(
        ema.ArgumentTypeError, match=r"`decay` must be a number in .* or a schedule"
    ):
        ema.describe_ema(lambda count: 0.9, 10)
