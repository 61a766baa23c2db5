"""The table of schedules: its equations, evaluated independently with 50 digits."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import pickle

import mpmath
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import ema
from ema import schedules
from ema.schedules import SCHEDULES, Schedule, as_schedule, schedule_from_dict

mpf = mpmath.mpf

EXAMPLES = [
    *schedules.EXAMPLES,
    ema.ConstantDecay(decay=0.0),
    ema.ConstantDecay(decay=0.999),
    ema.ConstantDecay(decay=1.0),
    ema.HalfLife(steps=0.5),
    ema.HalfLife(steps=1e6),
    ema.HalfLifeRampup(steps=2000),
    ema.HalfLifeRampup(steps=1e6, rampup_ratio=0.01),
    ema.HalfLifeRampup(steps=math.inf, rampup_ratio=0.05),
    ema.InverseGammaWarmup(decay=0.9999),
    ema.InverseGammaWarmup(decay=0.99, inv_gamma=5, power=0.75, min_decay=0.5),
    ema.InverseGammaWarmup(decay=1.0, power=1),
    ema.RampWarmup(decay=0.9999),
    ema.RampWarmup(decay=0.1),
    ema.ExponentialRamp(decay=0.9999, tau=2000),
    ema.ExponentialRamp(decay=0.5, tau=0.3),
    ema.ExponentialRamp(decay=1.0, tau=1e5),
    ema.DebiasedDecay(decay=0.0),
    ema.DebiasedDecay(decay=0.999),
    ema.DebiasedDecay(decay=0.9999999),
    ema.PowerFunction(gamma=0),
    ema.PowerFunction.from_std(0.05),
    ema.PowerFunction.from_std(0.1),
    ema.CosineDecay(start=0.996, total_steps=1e6),
    ema.CosineDecay(start=0.9, end=0.9999, total_steps=12_345),
    ema.CosineDecay(start=0.999, end=0.5, total_steps=1000),
    ema.UniformAverage(),
]
SPANS = [1, 3, 1000]
COUNTS = sorted({*range(1, 60), *(round(10 ** (k / 20)) for k in range(20, 121)), 999_999})


def cosine(f, k, t):
    share = min((t - k) / f["total_steps"], mpf(1))
    sine = mpmath.sin(mpmath.pi / 2 * (1 - share))
    return 1 - ((1 - f["end"]) + (f["end"] - f["start"]) * sine**2)


EQUATIONS = {  # the rows of the table, written down again: fields f, update n, span k, steps t
    "ConstantDecay": lambda f, n, k, t: f["decay"],
    "HalfLife": lambda f, n, k, t: mpf(2) ** (-k / f["steps"]),
    "HalfLifeRampup": lambda f, n, k, t: mpf(2) ** (-k / min(f["steps"], f["rampup_ratio"] * t)),
    "InverseGammaWarmup": lambda f, n, k, t: max(
        f["min_decay"], min(f["decay"], 1 - (1 + n / f["inv_gamma"]) ** -f["power"])
    ),
    "RampWarmup": lambda f, n, k, t: min(f["decay"], (1 + n) / (10 + n)),
    "ExponentialRamp": lambda f, n, k, t: f["decay"] * (1 - mpmath.exp(-n / f["tau"])),
    "DebiasedDecay": lambda f, n, k, t: 1 - (1 - f["decay"]) / (1 - f["decay"] ** n),
    "PowerFunction": lambda f, n, k, t: (1 - k / t) ** (f["gamma"] + 1),
    "CosineDecay": lambda f, n, k, t: cosine(f, k, t),
    "UniformAverage": lambda f, n, k, t: 1 - 1 / n,
}


def exact_decay(schedule, n, span):
    fields = {name: mpf(value) for name, value in dataclasses.asdict(schedule).items()}
    return EQUATIONS[type(schedule).__name__](fields, mpf(n), mpf(span), mpf(n) * span)


class Precise:
    """The namespace of mpmath: the code of a schedule, run with as many digits as are wanted."""

    exp, expm1, log1p, sin = mpmath.exp, mpmath.expm1, mpmath.log1p, mpmath.sin
    minimum, maximum = min, max


def test_the_table_holds_every_schedule():
    assert set(SCHEDULES) == {
        name
        for name, cls in vars(schedules).items()
        if inspect.isclass(cls) and issubclass(cls, Schedule) and cls is not Schedule
    }


def of_mpf(schedule: Schedule) -> Schedule:
    """The same schedule with fields of as many digits as are wanted."""
    precise = copy.copy(schedule)
    for name, value in dataclasses.asdict(schedule).items():
        object.__setattr__(precise, name, mpf(value))
    return precise


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_the_weight_of_float64_is_that_of_fifty_digits_rounded(schedule, span):
    """Whatever its equation says: no digit is lost on the way."""
    with mpmath.workdps(50):
        precise = of_mpf(schedule)
        for count in COUNTS:
            exact = precise.weight(mpf(count), mpf(span), Precise)
            assert abs(mpf(schedule.weight(float(count), span)) - exact) <= mpf(1e-9) * exact, count


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_the_weight_is_right_to_float32_up_to_a_million_updates(schedule, span):
    """Relative error at most 1e-7 after the one rounding to float32, and 1e-9 before it."""
    if type(schedule).__name__ not in EQUATIONS:
        pytest.skip("its equation is written down in its own code only")
    with mpmath.workdps(50):
        for count in COUNTS:
            exact = 1 - exact_decay(schedule, count, span)
            weight = schedule.weight(float(count), span)
            assert abs(mpf(weight) - exact) <= mpf(1e-9) * exact, count
            rounded = float(np.float32(weight))
            assert abs(mpf(rounded) - exact) <= mpf(1e-7) * exact, count


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_numpy_and_python_floats_give_the_same_weights(schedule, span):
    counts = np.array(COUNTS, dtype=np.float64)
    with np.errstate(divide="ignore"):  # log1p(−1) of the power function's first update
        array = np.broadcast_to(schedule.weight(counts, span, np), counts.shape)
    floats = np.array([schedule.weight(float(count), span) for count in COUNTS])
    # an ulp in the angle of the cosine grows with the slope of the sine near its end
    allowed = 1e-11 if isinstance(schedule, ema.CosineDecay) else 4 * np.finfo(np.float64).eps
    np.testing.assert_allclose(array, floats, rtol=allowed, atol=0)
    np.testing.assert_array_equal(array.astype(np.float32), floats.astype(np.float32))


@pytest.mark.parametrize("count", [1, 10, 1_000, 1_000_000])
def test_a_decay_rounded_to_float32_loses_the_weight_that_we_keep(count):
    """1 − decay in float32 at a half-life of 1e6 is off by percents, the weight by 1e-7."""
    with mpmath.workdps(50):
        exact = 1 - mpf(2) ** (-1 / mpf(10**6))
        naive = np.float32(1) - np.float32(ema.decay_from_half_life(1e6))
        ours = np.float32(ema.HalfLife(steps=1e6).weight(float(count)))
        assert abs(mpf(float(naive)) / exact - 1) > 0.03
        assert abs(mpf(float(ours)) / exact - 1) < 1e-7


def test_a_power_of_the_decay_loses_the_weight_that_we_keep():
    with mpmath.workdps(50):
        exact = 1 - (1 - mpf("1e-5")) ** mpf("7.94")
        naive = np.float32(1) - np.float32(1 - np.float32(1e-5)) ** np.float32(7.94)
        ours = np.float32(ema.PowerFunction(gamma=6.94).weight(1e5))
        assert abs(mpf(float(naive)) / exact - 1) > 1e-3
        assert abs(mpf(float(ours)) / exact - 1) < 1e-7


def numbers(low: float, high: float | None = None, **rules):
    return st.floats(low, high, allow_nan=False, allow_infinity=False, **rules)


FRACTION = numbers(0, 1)
POSITIVE = numbers(0, exclude_min=True)
FIELDS = {
    ema.ConstantDecay: {"decay": FRACTION},
    ema.HalfLife: {"steps": POSITIVE},
    ema.HalfLifeRampup: {"steps": st.just(math.inf) | POSITIVE, "rampup_ratio": POSITIVE},
    ema.RampWarmup: {"decay": FRACTION},
    ema.ExponentialRamp: {"decay": FRACTION, "tau": POSITIVE},
    ema.DebiasedDecay: {"decay": numbers(0, 1, exclude_max=True)},
    ema.PowerFunction: {"gamma": numbers(0)},
    ema.CosineDecay: {"start": FRACTION, "end": FRACTION, "total_steps": POSITIVE},
    ema.UniformAverage: {},
}
inverse_gamma = st.tuples(FRACTION, FRACTION, POSITIVE, POSITIVE).map(
    lambda v: ema.InverseGammaWarmup(
        decay=max(v[:2]), min_decay=min(v[:2]), inv_gamma=v[2], power=v[3]
    )
)
any_schedule = st.one_of(
    st.sampled_from(EXAMPLES),
    inverse_gamma,
    *(st.builds(cls, **fields) for cls, fields in FIELDS.items()),
)


@example(ema.DebiasedDecay(decay=0.059), 1, 1)  # an ulp above 1 unless it is clipped
@given(any_schedule, st.integers(1, 2**53), st.integers(1, 10**6))
def test_weights_lie_between_zero_and_one_exactly(schedule, count, span):
    assert 0.0 <= schedule.weight(float(count), span) <= 1.0
    with np.errstate(all="ignore"):
        array = schedule.weight(np.array([1.0, float(count)]), span, np)
    assert np.all((array >= 0.0) & (array <= 1.0))


@given(any_schedule)
def test_a_plain_dict_holds_all_of_a_schedule(schedule):
    fields = schedule.to_dict()
    assert all(type(value) in (str, float) for value in fields.values())
    again = schedule_from_dict(json.loads(json.dumps(fields)))
    assert type(again) is type(schedule)
    assert again == schedule
    assert hash(again) == hash(schedule)


@given(any_schedule)
def test_the_repr_is_the_expression_that_builds_it(schedule):
    assert eval(repr(schedule), {**SCHEDULES, "inf": math.inf}) == schedule


@given(st.integers(1, 10**5), st.integers(1, 100), numbers(100, 1e6))
def test_a_half_life_in_steps_does_not_depend_on_update_every(count, span, steps):
    """One update over ``span`` steps forgets as much as ``span`` updates over one."""
    schedule = ema.HalfLife(steps=steps)
    once = math.log1p(-schedule.weight(float(count), span))
    each = math.log1p(-schedule.weight(float(count), 1))
    assert once == pytest.approx(span * each, rel=1e-9)


@given(st.integers(1, 10**6), st.integers(1, 100))
def test_the_power_function_of_exponent_zero_is_the_uniform_average(count, span):
    uniform = ema.UniformAverage().weight(float(count), span)
    assert ema.PowerFunction(gamma=0).weight(float(count), span) == pytest.approx(
        uniform, rel=1e-14
    )


@given(st.one_of(st.builds(cls, **FIELDS[cls]) for cls in (ema.DebiasedDecay, ema.PowerFunction)))
def test_a_schedule_without_memory_of_the_start_copies_first(schedule):
    assert np.float32(schedule.weight(1.0)) == 1.0
    assert ema.UniformAverage().weight(1.0) == 1.0


def test_the_debiased_average_is_the_weighted_mean_of_what_it_saw():
    values = np.random.default_rng(0).normal(size=40)
    average, schedule = 1e6, ema.DebiasedDecay(decay=0.9)
    for count, value in enumerate(values, start=1):
        average += schedule.weight(float(count)) * (value - average)
    powers = 0.9 ** np.arange(39, -1, -1)
    assert average == pytest.approx((powers * values).sum() / powers.sum(), rel=1e-9)


def test_a_cosine_begins_with_its_start_and_ends_with_its_end():
    """The first update of BYOL and DINO has step 0; after ``total_steps`` steps the end is reached."""
    for span in (1, 4):
        schedule = ema.CosineDecay(start=0.9, end=0.99, total_steps=100)
        assert schedule.weight(1.0, span) == 1 - 0.9
        assert schedule.weight(1 + 50 / span, span) == pytest.approx(1 - 0.945)
        assert schedule.weight(1 + 100 / span, span) == 1 - 0.99
        assert schedule.weight(100 / span, span) > 1 - 0.99


@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_an_update_closes_one_step_unless_it_is_told_otherwise(schedule):
    for cls in (Schedule, type(schedule)):
        assert inspect.signature(cls.weight).parameters["span"].default == 1
    for count in (1.0, 7.0, 300.0):
        assert schedule.weight(count) == schedule.weight(count, 1)


def test_the_documented_defaults():
    assert ema.HalfLifeRampup(steps=1) == ema.HalfLifeRampup(steps=1, rampup_ratio=0.05)
    assert ema.InverseGammaWarmup(decay=0.9) == ema.InverseGammaWarmup(
        decay=0.9, inv_gamma=1, power=2 / 3, min_decay=0
    )
    cosine = ema.CosineDecay(start=0.5, total_steps=9)
    assert cosine == ema.CosineDecay(start=0.5, end=1, total_steps=9)


def test_a_number_outside_of_its_range_is_named_as_the_argument_that_it_was():
    with pytest.raises(ema.ArgumentError, match=r"^`decay\['a'\]` must lie in \[0, 1\], got 1.5"):
        as_schedule(1.5, "decay['a']")


def test_an_infinite_half_life_is_a_fixed_share_of_the_run():
    """``steps=inf``: the half-life is ``rampup_ratio`` of all steps so far, also as plain values."""
    schedule = ema.HalfLifeRampup(steps=math.inf, rampup_ratio=0.1)
    for count in (1.0, 10.0, 1e6):
        assert schedule.weight(count, 3) == pytest.approx(1 - 0.5 ** (1 / (0.1 * count)), rel=1e-9)
    fields = schedule.to_dict()
    assert fields == {"schedule": "HalfLifeRampup", "steps": "inf", "rampup_ratio": 0.1}
    assert schedule_from_dict(json.loads(json.dumps(fields, allow_nan=False))) == schedule


def test_equal_fields_make_equal_schedules_whatever_their_number_type():
    ints, floats = ema.HalfLife(steps=1000), ema.HalfLife(steps=np.float32(1000))
    assert ints == floats
    assert hash(ints) == hash(floats)
    assert len({ints, floats, ema.HalfLife(steps=999)}) == 2
    assert repr(ints) == str(floats) == "HalfLife(steps=1000.0)"


def test_schedules_of_different_classes_are_never_equal():
    assert ema.ConstantDecay(decay=0.9) != ema.RampWarmup(decay=0.9)
    assert ema.ConstantDecay(decay=0.9) != 0.9


@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_a_schedule_is_frozen_and_survives_copy_and_pickle(schedule):
    for field in dataclasses.fields(schedule):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schedule, field.name, 0.5)
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert copy.deepcopy(schedule) == schedule


@pytest.mark.parametrize("cls", SCHEDULES.values())
def test_fields_are_keyword_only_and_schedules_not_callable(cls):
    """For optax takes a callable hyperparameter for one of its own schedules."""
    assert all(field.kw_only for field in dataclasses.fields(cls))
    with pytest.raises(TypeError, match="positional argument"):
        cls(0.5)
    assert "__call__" not in vars(cls)
    assert not callable(EXAMPLES[0])


def test_the_base_class_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        Schedule()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 3.0}, "needs its class under the key 'schedule'"),
        ("HalfLife", "needs its class under the key 'schedule'"),
        (None, "needs its class under the key 'schedule'"),
        ({"schedule": "Schedule"}, "`schedule` must be one of .*HalfLife.*got 'Schedule'"),
        ({"schedule": "os.system"}, "`schedule` must be one of .*got 'os.system'"),
        ({"schedule": ["HalfLife"]}, r"`schedule` must be one of .*got \['HalfLife'\]"),
        ({"schedule": "HalfLife"}, r"HalfLife takes .*wrong or absent: \['steps'\]"),
        ({"schedule": "HalfLife", "steps": 3, "decay": 1}, r"wrong or absent: \['decay'\]"),
        ({"schedule": "HalfLife", 3: 1}, r"wrong or absent: \[3, 'steps'\]"),
        ({"schedule": "UniformAverage", "n": 1}, r"wrong or absent: \['n'\]"),
        ({"schedule": "HalfLife", "steps": math.nan}, "`steps` must be finite, got nan"),
        ({"schedule": "HalfLife", "steps": "inf"}, "`steps` must be finite, got inf"),
        ({"schedule": "HalfLifeRampup", "steps": "nan"}, "`steps` must be finite, got nan"),
        ({"schedule": "HalfLifeRampup", "steps": "-inf"}, "`steps` must be finite, got -inf"),
    ],
)
def test_a_dict_that_is_no_schedule_is_refused(fields, message):
    with pytest.raises(ema.ArgumentError, match=message):
        schedule_from_dict(fields)


def test_a_field_of_the_wrong_type_in_a_dict_is_refused():
    with pytest.raises(ema.ArgumentTypeError, match="`steps` must be a real number, got '3'"):
        schedule_from_dict({"schedule": "HalfLife", "steps": "3"})


def test_fields_with_defaults_may_be_absent_from_a_dict():
    fields = {"schedule": "HalfLifeRampup", "steps": 10}
    assert schedule_from_dict(fields) == ema.HalfLifeRampup(steps=10)
    assert fields == {"schedule": "HalfLifeRampup", "steps": 10}


def test_a_number_means_a_constant_decay_and_a_schedule_itself():
    schedule = ema.HalfLife(steps=10)
    assert as_schedule(schedule) is schedule
    assert as_schedule(1) == ema.ConstantDecay(decay=1.0)
