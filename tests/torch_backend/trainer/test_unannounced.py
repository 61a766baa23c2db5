"""Checkpoints that the Trainer writes without ``on_save`` hold the average of the step in their name."""

import shutil

import optuna
import pytest
import torch
from transformers import Trainer, TrainerCallback

from ema import CheckpointError, EMACallback, EMAWarning
from ema.torch_backend import EMAModel
from ema.torch_backend.trainer import last_complete_checkpoint
from tests.torch_helpers import assert_same

MARK = "checkpoint-is-incomplete.txt"

# three steps an epoch, two batches a step, an evaluation and a log after each
TRAINING = {
    "gradient_accumulation_steps": 2,
    "rows": 12,
    "steps": 12,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
}
# in each of these events, the step at whose number a checkpoint is saved
EVENTS = {
    "on_train_begin": 0,
    "on_step_begin": 1,
    "on_substep_end": 2,
    "on_epoch_begin": 3,
    "on_pre_optimizer_step": 4,
    "on_optimizer_step": 5,
    "on_epoch_end": 6,
    "on_step_end": 7,
    "on_log": 8,
    "on_prediction_step": 10,
    "on_evaluate": 11,
    "on_train_end": 12,
}


class Saver(TrainerCallback):
    """Saves checkpoints in the middle of events, as the Trainer itself does on SIGTERM."""

    def __init__(self, events):
        self.trainer = None
        for event, step in events.items():
            setattr(self, event, self._saving_at(step))

    def _saving_at(self, step):
        def save(args, state, control, **kwargs):
            if state.global_step == step:
                self.trainer._save_checkpoint(self.trainer.model, trial=None)

        return save


@pytest.fixture
def saved_run(new_gpt2, make_trainer, tokens):
    """Train with a callback that saves, in front of ours or behind it."""

    def run(events, callback, *others, front=True, attached=False, seed=0, resume=None, **options):
        saver = Saver(events)
        pair = [saver, callback] if front else [callback, saver]
        options = {**TRAINING, "eval_dataset": tokens(4, seed=1), **options}
        saver.trainer = make_trainer(new_gpt2(seed=seed), [*others, *pair], **options)
        if attached:
            callback.attach(saver.trainer)
        saver.trainer.train(resume_from_checkpoint=resume)
        return saver.trainer

    return run


@pytest.fixture
def load(new_gpt2):
    """The average in a checkpoint."""

    def read(folder):
        average = EMAModel(new_gpt2(), 0.5)
        average.load(folder)
        return average

    return read


def untold(front):
    """The one event of the run after which, or before which, a callback is told nothing."""
    return "on_train_begin" if front else "on_train_end"


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
@pytest.mark.parametrize("front", [True, False], ids=["front", "behind"])
def test_a_save_in_the_middle_of_any_event(saved_run, load, recorder, folder, front, attached):
    """The file has the average of that step; the run's own average is that of a run without saves."""
    record, callback = recorder(), EMACallback(0.5)
    saved_run(EVENTS, callback, record, front=front, attached=attached)
    assert callback.ema_model.count == 12
    assert_same(callback.ema_model.averaged_parameters(), record.average(0.5))
    for event, step in EVENTS.items():
        checkpoint = folder / f"checkpoint-{step}"
        assert (checkpoint / "trainer_state.json").exists(), event
        if event == untold(front) and not attached:
            assert not (checkpoint / "ema.safetensors").exists()
            continue
        average = load(checkpoint)
        assert (average.step, average.count) == (step, step), event
        assert_same(average.averaged_parameters(), record.average(0.5, step))
        assert_complete(checkpoint)


def assert_complete(checkpoint):
    """It passes for complete until its optimizer is missing."""
    others = [path for path in checkpoint.parent.iterdir() if path != checkpoint]
    for path in others:
        path.rename(path.with_name(f"hidden-{path.name}"))
    assert last_complete_checkpoint(checkpoint.parent) == checkpoint
    (checkpoint / "optimizer.pt").rename(checkpoint / "hidden.pt")
    assert last_complete_checkpoint(checkpoint.parent) is None
    (checkpoint / "hidden.pt").rename(checkpoint / "optimizer.pt")
    for path in others:
        path.with_name(f"hidden-{path.name}").rename(path)


SAVE_WHILE_EVALUATING = {"on_prediction_step": 2, "on_evaluate": 3}


# alone, the callback may say that the rest of the evaluation has live weights too
@pytest.mark.filterwarnings("ignore:a checkpoint that a callback writes")
@pytest.mark.filterwarnings("ignore:this evaluation saw live weights")
@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_a_save_in_the_middle_of_an_evaluation_holds_live_weights(
    saved_run, new_gpt2, load, recorder, folder, attached
):
    """The weights to train on stand in the model's file, and the average in its own."""
    record = recorder()
    callback = EMACallback(0.5, eval_with_ema=True)
    saved_run(SAVE_WHILE_EVALUATING, callback, record, attached=attached, steps=4)
    for event, step in SAVE_WHILE_EVALUATING.items():
        checkpoint = folder / f"checkpoint-{step}"
        saved = dict(new_gpt2().from_pretrained(checkpoint).named_parameters())
        live = {name: torch.equal(saved[name], v) for name, v in record.history[step].items()}
        assert all(live.values()), event
        assert_same(load(checkpoint).averaged_parameters(), record.average(0.5, step))


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end"])
def test_a_checkpoint_of_another_run_in_the_way(saved_run, load, recorder, folder, event, attached):
    """Its average is replaced; and those of steps that this run does not save stay as they are."""
    saved_run({"on_step_begin": 2, "on_step_end": 4}, EMACallback(0.5), steps=5, seed=1)
    others = load(folder / "checkpoint-2").averaged_parameters()
    record = recorder()
    saved_run({event: 4}, EMACallback(0.5), record, attached=attached, steps=5)
    assert_same(load(folder / "checkpoint-4").averaged_parameters(), record.average(0.5, 4))
    assert_same(load(folder / "checkpoint-2").averaged_parameters(), others)


def test_a_checkpoint_of_another_run_without_an_average_stays_without(saved_run, folder):
    """Alone: also where this run saves the step after it."""
    saved_run({"on_step_begin": 2, "on_step_end": 3}, EMACallback(0.5), steps=4, seed=1)
    for step in (2, 3):
        (folder / f"checkpoint-{step}" / "ema.safetensors").unlink()
    saved_run({"on_step_end": 3}, EMACallback(0.5), steps=4)
    assert not (folder / "checkpoint-2" / "ema.safetensors").exists()
    assert (folder / "checkpoint-3" / "ema.safetensors").exists()


@pytest.mark.parametrize("front", [True, False], ids=["front", "behind"])
def test_saved_again_in_the_step_that_was_saved(saved_run, load, folder, front):
    """Alone: the file that on_save wrote is written again, with what was saved last beside it."""
    callback = EMACallback(0.5)
    saving = {"save_strategy": "steps", "save_steps": 2}
    saved_run({"on_step_begin": 2}, callback, front=front, steps=3, **saving)
    assert load(folder / "checkpoint-2").count == 2
    assert_complete(folder / "checkpoint-2")


def test_outside_of_training_a_trainer_that_is_attached_saves_the_average_too(
    saved_run, load, folder
):
    """After the run, and for Ray Tune; before it, and for another model, there is none."""
    callback = EMACallback(0.5)
    trainer = saved_run({}, callback, attached=True, steps=3)
    trainer._save_checkpoint(trainer.model, trial=None)
    trainer._tune_save_checkpoint(str(folder / "tune"))
    expected = callback.ema_model.averaged_parameters()
    for saved in (folder / "checkpoint-3", folder / "tune" / "checkpoint-3"):
        assert_same(load(saved).averaged_parameters(), expected)
    shutil.rmtree(folder)
    callback.detach()
    trainer._save_checkpoint(trainer.model, trial=None)
    assert not (folder / "checkpoint-3" / "ema.safetensors").exists()


def test_before_training_there_is_no_average_to_save(gpt2, make_trainer, folder):
    callback = EMACallback(0.5)
    trainer = make_trainer(gpt2, [callback], save_only_model=True)
    callback.attach(trainer)
    trainer._save_checkpoint(trainer.model, trial=None)
    assert not (folder / "checkpoint-0" / "ema.safetensors").exists()
    trainer.train()
    assert not (folder / "checkpoint-0" / "ema.safetensors").exists()


class Scaled(Trainer):
    """With a gradient scaler that overflows at first: accelerate has none for the CPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**127, backoff_factor=2.0**-30
        )


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_a_step_that_the_gradient_scaler_skipped_is_saved(
    new_gpt2, make_trainer, recorder, load, folder, optim
):
    """In front of our callback, at every step: steps that moved nothing do not count."""
    record, saver, callback = recorder(), Saver({}), EMACallback(0.5)
    saver.on_step_end = lambda *_, **__: saver.trainer._save_checkpoint(None, None)
    options = {"steps": 8, "kind": Scaled, "optim": optim, "max_grad_norm": 0}
    saver.trainer = make_trainer(new_gpt2(), [record, saver, callback], **options)
    callback.attach(saver.trainer)
    saver.trainer.train()
    moved = [0]
    for before, after in zip(record.history, record.history[1:], strict=False):
        same = all(torch.equal(before[name], after[name]) for name in before)
        moved.append(moved[-1] + (not same))
    assert moved[-1] not in (0, 8)
    for step in range(1, 9):
        assert load(folder / f"checkpoint-{step}").count == moved[step]
    by_hand = [record.history[moved.index(count)] for count in range(moved[-1] + 1)]
    record.history = by_hand
    assert_same(callback.ema_model.averaged_parameters(), record.average(0.5))


def test_several_that_are_attached(saved_run, new_gpt2, make_trainer, load, folder):
    """Each writes its file; the one that was attached last writes last."""
    fast, slow = EMACallback(0.5, name="fast"), EMACallback(0.5, name="slow")
    saver = Saver({"on_step_end": 2})
    saver.trainer = make_trainer(new_gpt2(), [saver, fast, slow], steps=3)
    slow.attach(saver.trainer)
    fast.attach(saver.trainer)
    saver.trainer.train()
    for name in ("fast", "slow"):
        assert load(folder / "checkpoint-2" / f"ema-{name}.safetensors").count == 2
    assert last_complete_checkpoint(folder, name="fast") == folder / "checkpoint-2"
    assert (fast.ema_model.count, slow.ema_model.count) == (3, 3)


def test_a_checkpoint_with_the_mark_of_an_incomplete_one(saved_run, folder):
    """It is passed over; one that was saved while the mark was there does not need it."""
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoint-4" / MARK).write_text("Checkpoint started")
    saved_run({"on_step_begin": 2, "on_step_end": 4}, EMACallback(0.5), attached=True, steps=5)
    assert last_complete_checkpoint(folder) == folder / "checkpoint-2"
    (folder / "checkpoint-4" / MARK).unlink()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-4"


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_resuming_from_an_incomplete_checkpoint_is_pointed_out(saved_run, folder, attached):
    """A warning that names the way to a complete one, or an error, by option."""
    saved_run({"on_step_begin": 2}, EMACallback(0.5), steps=3)
    (folder / "checkpoint-2" / MARK).write_text("Checkpoint started")
    strict = EMACallback(0.5, on_missing_average="error")
    message = r"checkpoint-2 is incomplete, .*last_complete_checkpoint finds"
    with pytest.raises(CheckpointError, match=message):
        saved_run({}, strict, attached=attached, resume=True, steps=3)
    callback = EMACallback(0.5)
    with pytest.warns(EMAWarning, match=message):
        saved_run({}, callback, attached=attached, resume=True, steps=3)
    assert callback.ema_model.count == 3


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("hp_name", [None, lambda trial: f"own{trial.number}"], ids=["run", "own"])
@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_in_a_trial_of_a_search(new_gpt2, make_trainer, recorder, load, folder, attached, hp_name):
    """In the folder of the trial, and outside of it, where the Trainer saves on SIGTERM."""
    record, saver, callback = recorder(), Saver({}), EMACallback(0.5)
    expected = []

    def save(args, state, control, **kwargs):
        if state.global_step == 2:
            saver.trainer._save_checkpoint(saver.trainer.model, saver.trainer._trial)
            saver.trainer._save_checkpoint(saver.trainer.model, trial=None)
            expected.append(record.average(0.5, 2))

    saver.on_step_end = save
    trainer = saver.trainer = make_trainer(
        None,
        [record, saver, callback],
        kind=lambda model, **options: Trainer(model_init=lambda: new_gpt2(seed=0), **options),
        eval_dataset=[{"input_ids": torch.arange(8), "labels": torch.arange(8)}],
        steps=3,
    )
    if attached:
        callback.attach(trainer)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        backend="optuna",
        n_trials=2,
        hp_name=hp_name,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    trials = ["run-0", "run-1"] if hp_name is None else ["own0", "own1"]
    for trial, average in zip(trials, expected, strict=True):
        assert_same(load(folder / trial / "checkpoint-2").averaged_parameters(), average)
        assert_complete(folder / trial / "checkpoint-2")
    assert_same(load(folder / "checkpoint-2").averaged_parameters(), expected[1])
