"""Trainer runs with a schedule of the user's own."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import ema
from ema import EMAWarning
from ema.torch_backend import EMACallback
from tests.own_schedules import DESCRIBED, UNDESCRIBED, Answers, Table

SAVING = {"save_strategy": "steps", "save_steps": 2}
SCHEDULES = {
    **{name: DESCRIBED[name][0] for name in ("tuple", "nested", "our name", "slots")},
    "function": UNDESCRIBED["function"],
    "tensor": Table(torch.tensor([0.5, 0.75])),
}


@pytest.mark.parametrize("attached", [False, True], ids=["", "attached"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_with_any_schedule_resumes_bit_for_bit_without_a_warning(
    new_gpt2, train, folder, name, attached
):
    """Each checkpoint has its average, and none warns that the schedule is another one."""
    whole = EMACallback(SCHEDULES[name])
    train(new_gpt2(), [whole], **SAVING)
    expected = whole.get_ema_state()
    for later in folder.glob("checkpoint-*"):
        if later.name != "checkpoint-4":
            shutil.rmtree(later)
    callback = EMACallback(SCHEDULES[name])
    train(
        new_gpt2(seed=1), [callback], attach=callback if attached else None, resume=True, **SAVING
    )
    resumed = callback.get_ema_state()
    assert (resumed["step"], resumed["schedule"]) == (expected["step"], expected["schedule"])
    for key, value in expected["averages"].items():
        assert torch.equal(resumed["averages"][key], value)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_note_beside_averaged_weights_describes_the_schedule_or_says_null(
    gpt2, train, tmp_path, name
):
    callback = EMACallback(SCHEDULES[name])
    train(gpt2, [callback])
    callback.save_pretrained(gpt2, tmp_path / "averaged")
    note = json.loads((tmp_path / "averaged" / "ema.json").read_text())
    described = DESCRIBED[name][1] if name in DESCRIBED else None
    assert note["schedule"] == described
    assert note["decay"] == callback.ema_model.decay
    AutoModelForCausalLM.from_pretrained(tmp_path / "averaged")


def test_a_note_is_written_where_the_schedule_has_no_weight_yet(gpt2, train, tmp_path):
    callback = EMACallback(Answers(2.0), update_after_step=100)
    with pytest.warns(EMAWarning, match="the average still equals weights of the run"):
        train(gpt2, [callback])
    callback.save_pretrained(gpt2, tmp_path / "averaged")
    note = json.loads((tmp_path / "averaged" / "ema.json").read_text())
    assert note["decay"] is None
    assert note["schedule"] == {"schedule": "Answers", "answer": 2.0, "at": 1}


def test_a_schedule_that_ends_before_the_run_is_told_at_the_start(gpt2, train):
    """A run may end early, so it begins; the update that has no weight raises."""

    @dataclasses.dataclass(frozen=True)
    class Short(ema.Schedule):
        decays: tuple[float, ...]

        def weight(self, count, span=1, xp=None):
            return 1 - self.decays[int(count) - 1]

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    callback = EMACallback(Short((0.5, 0.5)))
    with pytest.warns(
        EMAWarning, match=r"does not give a weight for every update of 6 steps: Index"
    ):
        train(gpt2, [callback, Stop()])
    assert callback.ema_model.count == 2
    with (
        pytest.warns(EMAWarning, match="does not give a weight"),
        pytest.raises(IndexError),
    ):
        train(gpt2, [EMACallback(Short((0.5, 0.5)))])


def test_a_slow_schedule_of_floats_only_is_told(gpt2, train):
    with pytest.warns(EMAWarning, match=r"Table\(decays=\(0.999,\)\) is slow for so short a run"):
        train(gpt2, [EMACallback(Table((0.999,)))])
    with warnings.catch_warnings():
        warnings.simplefilter("error", EMAWarning)
        train(gpt2, [EMACallback(Table((0.5,)))])
