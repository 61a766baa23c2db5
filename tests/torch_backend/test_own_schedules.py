"""Schedules of the user's own in an ``EMAModel``: training, states, files and copies."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import ema
from ema import CheckpointError, EMAModel, EMAWarning
from ema.checkpoint import read_state
from ema.weights import weight_of
from tests.own_schedules import ALL, DESCRIBED, UNDESCRIBED, WRONG, Answers, Constant, Table, Warmup
from tests.torch_helpers import another, assert_same, step, values


@dataclasses.dataclass(frozen=True)
class OfTensors(ema.Schedule):
    """Answers with tensors of no dimension."""

    decays: torch.Tensor

    def weight(self, count, span=1, xp=None):
        return 1 - self.decays[min(int(count), len(self.decays)) - 1]


SCHEDULES = {**ALL, "tensor": OfTensors(torch.tensor([0.5, 0.75, 0.875]))}


def advance(model, average, step, steps):
    for _ in range(steps):
        step(model)
        average.update()


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_schedule_is_followed(model, name):
    """Each update has the weight that the schedule gives for its number."""
    average = EMAModel(model, SCHEDULES[name], update_every=2)
    expected = values(model)
    for number in range(1, 9):
        step(model)
        average.update()
        if number % 2 == 0:
            weight = weight_of(SCHEDULES[name], number // 2, 2)
            for key, live in values(model).items():
                expected[key].lerp_(live, weight)
    for key, value in average.averaged_parameters().items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("error")
def test_any_schedule_is_saved_and_resumed_without_a_warning(model, tmp_path, name):
    """In a state dict that loads with ``weights_only=True``, and in a file; both go on as before."""
    average = EMAModel(model, SCHEDULES[name])
    advance(model, average, step, 3)
    buffer = io.BytesIO()
    torch.save(average.state_dict(), buffer)
    buffer.seek(0)
    average.save(tmp_path)
    copies = [another() for _ in range(2)]
    for other in copies:
        other.load_state_dict(model.state_dict())
    resumed = [EMAModel(other, SCHEDULES[name]) for other in copies]
    resumed[0].load_state_dict(torch.load(buffer, weights_only=True))
    resumed[1].load(tmp_path)
    for live, each in zip((model, *copies), (average, *resumed), strict=True):
        torch.manual_seed(1)
        advance(live, each, step, 3)
    for each in resumed:
        assert (each.step, each.count) == (6, 6)
        assert_same(each.averaged_parameters(), average.averaged_parameters())


@pytest.mark.parametrize("name", SCHEDULES)
def test_state_and_file_hold_the_description_or_null(model, tmp_path, name):
    average = EMAModel(model, SCHEDULES[name])
    description = DESCRIBED[name][1] if name in DESCRIBED else None
    assert average.state_dict()["schedule"] == description
    assert read_state(average.save(tmp_path)).record.schedule == description
    average.export(tmp_path / "plain.safetensors")


def test_several_averages_are_described_each_by_its_name(model, tmp_path):
    schedules = {
        "table": Table((0.5, 0.75)),
        "function": UNDESCRIBED["function"],
        "ours": ema.HalfLife(steps=3),
    }
    average = EMAModel(model, schedules)
    advance(model, average, step, 2)
    state = average.state_dict()
    assert state["schedule"] == {
        "table": {"schedule": "Table", "decays": [0.5, 0.75]},
        "function": None,
        "ours": {"schedule": "HalfLife", "steps": 3.0},
    }
    files = {name: average.save(tmp_path / name, name=name) for name in schedules}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EMAModel(another(), schedules).load_state_dict(state)
        resumed = EMAModel(another(), schedules)
        for name, file in files.items():
            resumed.load(file, name=name)
    other = EMAModel(another(), {**schedules, "table": Table((0.5, 0.5))})
    with pytest.warns(EMAWarning, match=r"'decays': \[0\.5, 0\.75\].*'decays': \[0\.5, 0\.5\]"):
        other.load_state_dict(state)
    with pytest.warns(EMAWarning, match=r"'decays': \[0\.5, 0\.75\].*'decays': \[0\.5, 0\.5\]"):
        other.load(files["table"], name="table")


@pytest.mark.parametrize(
    ("saved", "constructed", "told"),
    [
        (Table((0.5, 0.75)), Table((0.5, 0.8)), True),
        (Constant(decay=0.5), 0.5, True),
        (ema.HalfLife(steps=3), Constant(decay=0.5), True),
        (DESCRIBED["our name"][0], ema.HalfLife(steps=3), True),
        (DESCRIBED["our name and fields"][0], ema.HalfLifeRampup(steps=5.0), True),
        (UNDESCRIBED["function"], 0.5, False),
        (0.5, UNDESCRIBED["function"], False),
        (ema.HalfLifeRampup(steps=math.inf), ema.HalfLifeRampup(steps=math.inf), False),
    ],
)
def test_a_warning_says_where_constructor_and_state_differ(
    model, tmp_path, saved, constructed, told
):
    """As far as both can be described; the schedule of the constructor stays."""
    average = EMAModel(model, saved)
    average.save(tmp_path)
    for load in (
        lambda other: other.load(tmp_path),
        lambda other: other.load_state_dict(average.state_dict()),
    ):
        other = EMAModel(another(), constructed)
        before = other.schedule
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load(other)
        assert [w.category for w in caught] == [EMAWarning] * told
        assert other.schedule is before


def test_a_state_with_tuples_is_that_of_the_same_schedule(model):
    """As ``dataclasses.asdict`` gives them; a tensor in it is not compared."""
    state = EMAModel(model, Table((0.5, 0.75))).state_dict()
    other = EMAModel(another(), Table((0.5, 0.75)))
    for decays in ((0.5, 0.75), torch.tensor([0.1, 0.2])):
        state["schedule"] = {"schedule": "Table", "decays": decays}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(state)


def test_a_file_is_loaded_where_the_class_is_not_known(model, tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Gone(ema.Schedule):
        low: float

        def weight(self, count, span=1, xp=None):
            return 0.5

    EMAModel(model, Gone(0.25)).save(tmp_path)
    del Gone
    other = EMAModel(another(), 0.5)
    with pytest.warns(EMAWarning, match="'schedule': 'Gone', 'low': 0.25"):
        other.load(tmp_path)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("answer", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_weight_is_one_error_and_changes_nothing(model, answer, message, frozen):
    """Counters and tensors are what they were, and a parameter that joins has not joined."""
    if frozen:
        model.second.weight.requires_grad_(requires_grad=False)
    schedule = Answers(answer, at=3)
    average = EMAModel(model, schedule, update_after_step=1, update_every=2)
    advance(model, average, step, 6)
    model.second.weight.requires_grad_(requires_grad=True)
    step(model)
    before = copy.deepcopy(average.state_dict())
    expected = re.escape(f"the weight of `{schedule!r}` {message} at update 3")
    for _ in range(2):
        with pytest.raises((ema.ArgumentError, ema.ArgumentTypeError), match=expected):
            average.update()
        after = average.state_dict()
        assert (average.step, average.count) == (6, 2)
        assert after["averages"].keys() == before["averages"].keys()
        for key, value in after["averages"].items():
            assert torch.equal(value, before["averages"][key])


def test_an_error_of_the_schedule_itself_changes_nothing(model):
    average = EMAModel(model, {"ours": 0.5, "short": Table(())})
    step(model)
    before = average.state_dict()
    with pytest.raises(IndexError):
        average.update()
    assert (average.step, average.count) == (0, 0)
    for label, tensors in average.state_dict()["averages"].items():
        assert all(torch.equal(v, before["averages"][label][k]) for k, v in tensors.items())


def test_a_weight_that_is_wrong_before_it_is_due_does_not_stop_a_save(model, tmp_path):
    average = EMAModel(model, Answers(math.nan, at=1))
    average.save(tmp_path)
    average.export(tmp_path / "plain.safetensors")
    with pytest.raises(ema.ArgumentError, match="got nan at update 1"):
        assert average.decay


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_go_on(model, name, duplicate):
    average = EMAModel(model, SCHEDULES[name])
    advance(model, average, step, 2)
    other = duplicate(average)
    for each in (average, other):
        torch.manual_seed(1)
        advance(each.model, each, step, 2)
    assert_same(other.averaged_parameters(), average.averaged_parameters())


@pytest.mark.parametrize("name", ["tuple", "nested", "function"])
def test_distributed_checkpoints_hold_the_description(model, tmp_path, name):
    average = EMAModel(model, SCHEDULES[name])
    advance(model, average, step, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.distributed without a process group
        dcp.save({"ema": average.state_dict()}, checkpoint_id=tmp_path)
        other = EMAModel(another(), SCHEDULES[name])
        state = {"ema": other.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(state["ema"])
    assert (other.step, other.schedule) == (2, SCHEDULES[name])


def test_a_file_that_says_nonsense_about_its_schedule_is_damaged(model):
    state = EMAModel(model, Warmup(0.9, 3)).state_dict()
    with pytest.raises(CheckpointError, match="`schedule` must be a mapping, got 3"):
        EMAModel(another(), 0.5).load_state_dict({**state, "schedule": 3})


def test_the_representation_of_an_average_shows_its_schedule():
    assert "Constant(decay=0.5)" in repr(EMAModel(nn.Linear(1, 1), Constant(decay=0.5)))
