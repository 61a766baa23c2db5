"""Schedules of the user's own: what is said about them, and how they are asked."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings

import numpy as np
import pytest

import ema
from ema.options import Precision
from ema.plain_values import number_from_plain, plain
from ema.schedule_descriptions import describe_schedule, known_schedule, same_description
from ema.weights import ask, weight_of, weights_of
from tests.own_schedules import (
    ALL,
    DESCRIBED,
    UNDESCRIBED,
    WRONG,
    Answers,
    Attributes,
    Constant,
    Nested,
    Table,
    Warmup,
)


@pytest.mark.parametrize(("schedule", "description"), DESCRIBED.values(), ids=DESCRIBED)
def test_a_description_is_class_and_fields_and_equals_itself_after_json(schedule, description):
    assert schedule.to_dict() == describe_schedule(schedule) == description
    again = json.loads(json.dumps(description, allow_nan=False))
    assert again == description
    assert known_schedule(again) == description  # nothing is made of it
    assert same_description(schedule, again)
    assert not same_description(schedule, ema.ConstantDecay(decay=0.5))


@pytest.mark.parametrize("schedule", UNDESCRIBED.values(), ids=UNDESCRIBED)
def test_fields_that_are_not_plain_leave_a_schedule_without_a_description(schedule):
    """And one without a description agrees with any other."""
    assert describe_schedule(schedule) is None
    assert same_description(schedule, ema.ConstantDecay(decay=0.5))
    assert same_description({"schedule": "Mine"}, schedule)


def test_the_error_for_a_field_that_is_not_plain_names_its_class():
    with pytest.raises(
        ema.ArgumentTypeError, match="numbers, strings, lists or dicts, got ndarray"
    ):
        UNDESCRIBED["array"].to_dict()
    with pytest.raises(ema.ArgumentTypeError, match="nested at most 32 levels deep"):
        UNDESCRIBED["endless"].to_dict()


def test_a_description_of_tuples_is_the_description_of_lists():
    assert same_description({"schedule": "Table", "decays": (0.5, 1.0)}, Table([0.5, 1.0]))
    assert not same_description({"schedule": "Table", "decays": (0.5, 0.9)}, Table([0.5, 1.0]))


def test_only_what_a_schedule_is_compared_by_describes_it():
    @dataclasses.dataclass(frozen=True)
    class Cached(ema.Schedule):
        decay: float
        cache: dict = dataclasses.field(default_factory=dict, compare=False)

        def weight(self, count, span=1, xp=None):
            return self.cache.setdefault(count, 1 - self.decay)

    schedule = Cached(0.5)
    schedule.weight(1.0)
    assert describe_schedule(schedule) == {"schedule": "Cached", "decay": 0.5}
    asked = Attributes(0.25, 0.75)
    before = describe_schedule(asked)
    assert [asked.weight(5.0), asked.middle, asked._asked] == [0.5, 0.5, 1]
    assert describe_schedule(asked) == before


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"mine": 3}, {"schedule": "Own", "mine": 3}),
        ({"schedule": "other", "mine": (3,)}, {"schedule": "other", "mine": [3]}),
        ({"schedule": None}, {"schedule": "Own"}),
        ([3], None),
        (None, None),
    ],
)
def test_a_to_dict_of_the_users_own_is_taken_for_a_description(answer, expected):
    class Own(ema.Schedule):
        def weight(self, count, span=1, xp=None):
            return 0.5

        def to_dict(self):
            return answer

    assert describe_schedule(Own()) == expected


def test_describing_never_raises():
    class Raises(Constant):
        def to_dict(self):
            raise RuntimeError

    for thing in (Raises(decay=0.5), None, 3, "HalfLife", [], {}, {"schedule": 3}, object()):
        assert describe_schedule(thing) is None


def test_a_description_of_ours_becomes_the_schedule_only_where_all_its_fields_are_there():
    """A class of the user's own may have the name of one of ours, and some of its fields."""
    full = {"schedule": "HalfLifeRampup", "steps": "inf", "rampup_ratio": 0.1}
    assert known_schedule(full) == ema.HalfLifeRampup(steps=math.inf, rampup_ratio=0.1)
    for other in (
        {"schedule": "HalfLifeRampup", "steps": 3},
        {"schedule": "HalfLife", "steps": -1},
    ):
        assert known_schedule(other) == other


def test_plain_values_keep_no_type_of_their_own():
    class Text(str):
        __slots__ = ()

    for value in (Text("a"), np.str_("a"), np.float64(1), np.int8(1), np.bool_(True)):
        assert type(plain(value)) in (str, float, int, bool)
        assert plain(value) == value
    for number in (math.inf, -math.inf):
        assert number_from_plain(plain(number)) == number
    assert math.isnan(number_from_plain(plain(math.nan)))
    assert number_from_plain("infinite") == "infinite"


def test_two_schedules_that_are_no_dataclasses_are_equal_only_to_themselves():
    """The base class compares nothing, so it does not take different attributes for the same."""
    one, other = Attributes(0.25, 0.5), Attributes(0.25, 0.75)
    assert one == one  # noqa: PLR0124
    assert one != other
    assert len({one, other}) == 2


@pytest.mark.parametrize("name", ALL)
def test_any_schedule_is_described_for_a_run(name):
    """Whether it takes arrays or single floats only."""
    schedule = ALL[name]
    description = ema.describe_ema(schedule, 40, update_every=2)
    share = math.prod(1 - weight_of(schedule, count, 2) for count in range(1, 21))
    assert description.initial_share == pytest.approx(share, rel=1e-9)
    assert description.decay == 1 - weight_of(schedule, 20, 2)
    assert description.schedule is schedule


@dataclasses.dataclass(frozen=True)
class Careless(ema.Schedule):
    """Answers arrays, without an error, with what is wrong for most of their elements."""

    how: str

    def weight(self, count, span=1, xp=None):
        if self.how == "the first for all":
            return 1 / (1 + float(np.ravel(count)[0]))
        if self.how == "another shape":
            return np.full((2, 3), 0.5) if np.ndim(count) else 1 / (1 + count)
        if self.how == "out of range":
            return 1 / (1 + count) if np.ndim(count) == 0 else count
        if self.how == "a warning":
            warnings.warn("an array", stacklevel=2) if np.ndim(count) else None
            return 1 / (1 + count)
        return 0.5 if count in (3, 17) else 0.25


@pytest.mark.parametrize(
    "how", ["the first for all", "another shape", "out of range", "a warning", "in a tuple"]
)
def test_code_for_single_numbers_gives_the_weights_of_single_numbers(how):
    schedule, counts = Careless(how), np.arange(1.0, 200.0)
    expected = [schedule.weight(float(count)) for count in counts]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = weights_of(schedule, counts, 1)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert not caught  # what NumPy says about the attempt is not for the user


def test_one_wrong_weight_among_many_is_found():
    class Once(ema.Schedule):
        def weight(self, count, span=1, xp=None):
            return (
                xp.maximum(0.5, 2.0 - abs(count - 501))
                if xp is np
                else 2.0
                if count == 501
                else 0.5
            )

    schedule = Once()
    with pytest.raises(ema.ArgumentError, match=r"must lie in \[0, 1\], got 2.0 at update 501"):
        ema.describe_ema(schedule, 1000)


def test_an_expression_of_xp_is_asked_once_for_all_updates():
    calls = []

    class Counted(ema.Schedule):
        def weight(self, count, span=1, xp=None):
            calls.append(count)
            return xp.exp(-count)

    counts = np.arange(1.0, 100_001.0)
    np.testing.assert_array_equal(weights_of(Counted(), counts, 1), np.exp(-counts))
    assert len(calls) < 20


@pytest.mark.parametrize(("answer", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_weight_is_refused_with_schedule_value_and_update(answer, message):
    schedule = Answers(answer, at=7)
    expected = re.escape(f"the weight of `{schedule!r}` {message} at update 7")
    assert weight_of(schedule, 6, 1) == 0.5
    for call in (lambda: weight_of(schedule, 7, 1), lambda: ema.describe_ema(schedule, 10)):
        with pytest.raises((ema.ArgumentError, ema.ArgumentTypeError), match=expected):
            call()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(1 + 2e-16, 1.0), (-1e-16, 0.0), (1, 1.0), (np.float32(0.5), 0.5), (np.array(0.25), 0.25)],
)
def test_a_number_of_any_type_is_a_weight_and_rounding_is_not_held_against_it(answer, expected):
    weight = weight_of(Answers(answer), 1, 1)
    assert type(weight) is float
    assert weight == expected


@pytest.mark.parametrize(
    "weight",
    [
        lambda self, count: (count,),
        lambda self, count, span: (count, span),
        lambda self, count, span, xp: (count, span, xp),
        lambda self, count, span=1, xp=None: (count, span, xp),
        lambda self, count, span=1, *, xp=None: (count, span, xp),
        lambda self, count, span=1, **_: (count, span),
        lambda self, *arguments: arguments,
    ],
)
def test_a_weight_is_asked_with_the_arguments_that_it_takes(weight):
    schedule = type("Mine", (ema.Schedule,), {"weight": weight})()
    answer = ask(schedule, 3.0, 2, np)
    assert answer == (3.0, 2, np)[: len(answer)]


def test_advice_about_precision_does_not_need_a_weight_a_million_updates_on():
    """A table that ends earlier is no reason to refuse a bfloat16 average."""
    short = type("Short", (ema.Schedule,), {"weight": lambda self, count, *_: [0.5, 0.1][count]})
    Precision(stochastic_rounding=False).check_narrow("dtype", [short(), Nested(short())])
    with pytest.warns(ema.EMAWarning, match="does not move"):
        Precision(stochastic_rounding=False).check_narrow("dtype", [Warmup(0.9999, 3)])
