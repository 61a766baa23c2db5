"""The average in the Trainer's own logs, and so in everything that reads them."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer

from ema import EMACallback
from ema.torch_backend import model as model_module

LOGGING = {"steps": 6, "logging_strategy": "steps", "logging_steps": 2}


@pytest.fixture
def counted(monkeypatch):
    """How often the weights were compared."""
    calls = []
    original = model_module.relative_distance

    def distance(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(model_module, "relative_distance", distance)
    return calls


def test_logs_hold_decay_updates_and_distance(gpt2, train, tokens, counted, recorder):
    """Beside the loss, at the steps that the Trainer logs, and computed at no others."""
    callback = EMACallback(0.5, update_every=2, eval_with_ema=True)
    record = recorder()
    trainer = train(
        gpt2,
        [record, callback],
        attach=callback,
        eval_dataset=tokens(8, seed=1),
        eval_strategy="steps",
        eval_steps=1,
        **LOGGING,
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4, 6]
    assert [log["ema_updates"] for log in logs] == [1, 2, 3]
    assert [log["ema_decay"] for log in logs] == pytest.approx([0.5] * 3)
    assert len(counted) == 3
    assert not any("ema_decay" in log for log in trainer.state.log_history if "loss" not in log)
    live, average = record.history[-1], callback.get_ema_state()["averages"]
    difference = sum((average[name] - live[name]).square().sum().item() for name in live)
    norm = sum(value.square().sum().item() for value in live.values())
    assert logs[-1]["ema_distance"] == pytest.approx((difference / norm) ** 0.5, rel=1e-5)


def test_tensorboard_shows_them(gpt2, train, monkeypatch, tmp_path, counted):
    """Written by the Trainer's own reporter, read back from its event file."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = EMACallback(0.6)
    trainer = train(gpt2, [callback], attach=callback, report_to=["tensorboard"], **LOGGING)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ("ema_decay", "ema_updates", "ema_distance"):
        logged = [log[name] for log in trainer.state.log_history if name in log]
        shown = events.Scalars(f"train/{name}")
        assert [event.step for event in shown] == [2, 4, 6]
        assert [event.value for event in shown] == pytest.approx(logged)
    assert len(counted) == 3


def test_alone_the_logs_stay_as_they_are(gpt2, train, counted):
    trainer = train(gpt2, [EMACallback(0.6)], **LOGGING)
    assert not any("ema_decay" in log for log in trainer.state.log_history)
    assert counted == []


def test_two_callbacks_log_under_their_names(gpt2, make_trainer):
    fast, slow = EMACallback(0.5, name="fast"), EMACallback(0.7, name="slow")
    trainer = make_trainer(gpt2, [], **LOGGING)
    fast.attach(trainer)
    slow.attach(trainer)
    trainer.train()
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert (last["ema_fast_updates"], last["ema_slow_updates"]) == (6, 6)
    assert 0 < last["ema_fast_distance"] < last["ema_slow_distance"]


def test_a_log_in_the_middle_of_an_evaluation(gpt2, train, tokens):
    """Where the averages are in the model there is no distance, and no error."""

    class Talkative(Trainer):
        def prediction_step(self, *args, **kwargs):
            self.log({"loss": 0.0})
            return super().prediction_step(*args, **kwargs)

    callback = EMACallback(0.6, eval_with_ema=True)
    trainer = train(
        gpt2,
        [callback],
        attach=callback,
        kind=Talkative,
        eval_dataset=tokens(8, seed=1),
        eval_strategy="steps",
        eval_steps=3,
    )
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["ema_updates"] for log in logs] == [3, 6]
    assert not any("ema_distance" in log for log in logs)
