"""Each checkpoint holds the average; resuming finds it and goes on as if nothing had happened."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from ema import (
    CheckpointError,
    EMACallback,
    EMAWarning,
    HalfLife,
    InverseGammaWarmup,
    StateError,
)
from ema.checkpoint import read_state
from ema.torch_backend import EMAModel
from ema.torch_backend.trainer import last_complete_checkpoint
from tests.torch_helpers import assert_same

SAVING = {"steps": 8, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture
def assert_same_run():
    """Two callbacks have the same weights, averages and counters."""

    def check(ours, theirs):
        ours, theirs = ours.ema_model, theirs.ema_model
        assert (ours.step, ours.count) == (theirs.step, theirs.count)
        assert_same(ours.averaged_parameters(), theirs.averaged_parameters())
        assert_same(
            {n: p.detach() for n, p in ours.model.named_parameters()},
            {n: p.detach() for n, p in theirs.model.named_parameters()},
        )

    return check


@pytest.fixture
def interrupted(gpt2, train, folder):
    """A run of eight steps, and its folder as if it had been interrupted after step 3."""

    def run(options=None, **training):
        callback = EMACallback(**(options or {"decay": 0.6}))
        train(gpt2, [callback], **SAVING, **training)
        for later in ("checkpoint-6", "checkpoint-8"):
            shutil.rmtree(folder / later)
        return callback

    return run


CALLBACKS = {
    "plain": {"decay": 0.6},
    "every": {"decay": HalfLife(steps=2), "update_every": 2},
    "after": {"decay": 0.6, "update_after_step": 2},
    "not-begun": {"decay": 0.1, "update_after_step": 5, "update_every": 2},
    "schedule": {"decay": InverseGammaWarmup(decay=0.9)},
    "double": {"decay": 0.6, "dtype": torch.float64},
}


@pytest.mark.parametrize(
    ("options", "attached"),
    [
        *((options, False) for options in CALLBACKS.values()),
        *((CALLBACKS[name], True) for name in ("plain", "not-begun")),
    ],
    ids=[*CALLBACKS, "plain-attached", "not-begun-attached"],
)
def test_resumed_equals_uninterrupted(
    interrupted, new_gpt2, train, assert_same_run, options, attached
):
    """Bit for bit, whatever is averaged when; the model starts from other weights."""
    whole = interrupted(options)
    callback = EMACallback(**options)
    trainer = train(
        new_gpt2(seed=1),
        [callback],
        attach=callback if attached else None,
        resume=True,
        **SAVING,
    )
    assert callback in trainer.callback_handler.callbacks
    assert_same_run(callback, whole)


@pytest.mark.parametrize(
    "training",
    [
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"activation_checkpointing": True},
        {"restore_callback_states_from_checkpoint": True},
        {"logging_strategy": "steps", "logging_steps": 1},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"auto_find_batch_size": True},
    ],
    ids=str,
)
def test_resumed_equals_uninterrupted_however_it_trains(
    interrupted, new_gpt2, train, assert_same_run, folder, training
):
    """From a path, in the output folder, without attaching."""
    whole = interrupted(**training)
    callback = EMACallback(0.6)
    trainer = train(
        new_gpt2(seed=1), [callback], resume=str(folder / "checkpoint-3"), **SAVING, **training
    )
    assert callback in trainer.callback_handler.callbacks
    assert_same_run(callback, whole)


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"save_strategy": "epoch"},
        {"ignore_data_skip": True},
        {"steps": 12},  # the end of an epoch
        {"lr_scheduler_type": "constant"},
    ],
    ids=str,
)
def test_no_step_more_where_all_were_made(gpt2, new_gpt2, train, assert_same_run, folder, training):
    """Attached: a run that was interrupted between its last save and its end has the same end."""
    whole = EMACallback(0.6)
    train(gpt2, [whole], **{**SAVING, **training})
    again = EMACallback(0.6)
    trainer = train(new_gpt2(seed=1), [again], attach=again, resume=True, **{**SAVING, **training})
    assert trainer.state.global_step == whole.ema_model.step
    assert_same_run(again, whole)
    trainer.train()  # from the start, with all its steps
    assert trainer.state.global_step == again.ema_model.step == whole.ema_model.step


def test_a_step_more_than_all_is_announced(gpt2, new_gpt2, train):
    """Alone, the callback cannot keep the Trainer from it: the average follows the weights."""
    whole = EMACallback(0.6)
    train(gpt2, [whole], **SAVING)
    again = EMACallback(0.6)
    message = r"from step 8, and max_steps=8: .* one step more, .*; attach\(trainer\) ends training"
    with pytest.warns(EMAWarning, match=message):
        train(new_gpt2(seed=1), [again], resume=True, **SAVING)
    assert again.ema_model.step == 9
    train(new_gpt2(), [EMACallback(0.6)], resume=True, **{**SAVING, "steps": 12})  # of three left


def test_the_same_callback_resumes(interrupted, new_gpt2, train, folder):
    """Also where it still holds the average of the run that is repeated."""
    callback = interrupted()
    expected = callback.get_ema_state()
    train(callback.ema_model.model, [callback], resume=True, **SAVING)
    assert callback.ema_model.count == 8
    assert_same(callback.get_ema_state()["averages"], expected["averages"])


def test_from_a_folder_that_was_moved(
    interrupted, new_gpt2, train, assert_same_run, folder, tmp_path
):
    """Attached it is found; alone there is a message that names the two ways, or an error."""
    whole = interrupted()
    moved = str(shutil.move(folder, tmp_path / "elsewhere")) + "/checkpoint-3"
    callback = EMACallback(0.6)
    train(new_gpt2(seed=1), [callback], attach=callback, resume=moved, **SAVING)
    assert_same_run(callback, whole)
    shutil.rmtree(folder)

    alone = EMACallback(0.6)
    message = r"goes on from step 3 and the average starts anew.*attach\(trainer\).*load_ema_state"
    with pytest.warns(EMAWarning, match=message):
        train(new_gpt2(seed=1), [alone], resume=moved, **SAVING)
    assert alone.ema_model.count == 5
    shutil.rmtree(folder)

    strict = EMACallback(0.6, on_missing_average="error")
    with pytest.raises(CheckpointError, match=message):
        train(new_gpt2(seed=1), [strict], resume=moved, **SAVING)

    state = EMAModel(new_gpt2(), 0.6)
    state.load(moved)
    given = EMACallback(0.6)
    given.load_ema_state(state.state_dict())
    train(new_gpt2(seed=1), [given], resume=moved, **SAVING)
    assert_same_run(given, whole)


def test_the_same_step_of_another_run_is_not_taken_for_it(
    interrupted, new_gpt2, train, folder, tmp_path
):
    """Alone, the callback looks whether the checkpoint in the output folder is the one."""
    interrupted(logging_strategy="steps", logging_steps=1)
    moved = shutil.move(folder, tmp_path / "elsewhere")
    train(new_gpt2(seed=3), [EMACallback(0.6)], logging_strategy="steps", logging_steps=1, **SAVING)
    assert (folder / "checkpoint-3" / "ema.safetensors").exists()
    callback = EMACallback(0.6)
    with pytest.warns(EMAWarning, match="is not the checkpoint that training goes on from"):
        train(new_gpt2(), [callback], resume=str(moved / "checkpoint-3"), **SAVING)
    assert callback.ema_model.count == 5


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_a_checkpoint_without_an_average(new_gpt2, train, folder, attached):
    """A warning that says what happens, or an error, by option."""
    train(new_gpt2(), [], **SAVING)
    shutil.rmtree(folder / "checkpoint-8")
    strict = EMACallback(0.6, on_missing_average="error")
    with pytest.raises(CheckpointError, match=r"no average in .*checkpoint-6 \(ema.safetensors\)"):
        train(new_gpt2(), [strict], attach=strict if attached else None, resume=True, **SAVING)
    callback = EMACallback(0.6)
    with pytest.warns(EMAWarning, match="from step 6 and the average starts anew from the weights"):
        train(new_gpt2(), [callback], attach=callback if attached else None, resume=True, **SAVING)
    assert callback.ema_model.count == 2


def test_a_state_that_was_loaded_comes_first(interrupted, new_gpt2, train, folder):
    """load_ema_state before train() wins over what the checkpoint holds."""
    interrupted()
    given = EMACallback(0.6)
    train(new_gpt2(), [given], steps=5)
    given.load_ema_state(given.get_ema_state())
    train(new_gpt2(), [given], resume=True, **SAVING)
    assert given.ema_model.count == 5 + 5


def test_rotation_keeps_whole_checkpoints(gpt2, train, folder):
    """save_total_limit removes the average with its checkpoint, and nothing else."""
    options = {"steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    train(gpt2, [EMACallback(0.6)], **options)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", "checkpoint-8"]
    assert all((path / "ema.safetensors").exists() for path in folder.iterdir())
    assert last_complete_checkpoint(folder).name == "checkpoint-8"


def test_the_best_checkpoint_survives_rotation_with_its_average(gpt2, train, tokens, folder):
    """The average at the end is the one of the best metric, also with save_total_limit=1."""
    callback = EMACallback(0.6, eval_with_ema=True)
    trainer = train(
        gpt2,
        [callback],
        steps=8,
        eval_dataset=tokens(8, seed=1),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    losses = {
        log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log
    }
    best = min(losses, key=losses.get)
    assert [path.name for path in folder.iterdir()] == [f"checkpoint-{best}"]
    assert callback.ema_model.step == best


def test_two_callbacks_with_names(gpt2, new_gpt2, train, folder, assert_same_run):
    """Each has a file of its own in every checkpoint, and finds it again."""
    fast, slow = EMACallback(0.5, name="fast"), EMACallback(0.7, name="slow")
    train(gpt2, [fast, slow], **SAVING)
    shutil.rmtree(folder / "checkpoint-8")
    files = {file.name for file in (folder / "checkpoint-6").glob("ema*")}
    assert files == {"ema-fast.safetensors", "ema-slow.safetensors"}
    assert last_complete_checkpoint(folder) is None
    assert last_complete_checkpoint(folder, name="slow").name == "checkpoint-6"
    again = EMACallback(0.5, name="fast"), EMACallback(0.7, name="slow")
    train(new_gpt2(seed=1), again, resume=True, **SAVING)
    assert_same_run(again[0], fast)
    assert_same_run(again[1], slow)


def test_two_callbacks_without_names(gpt2, train):
    """They would write one file: refused before training begins; so are two that evaluate."""
    with pytest.raises(StateError, match=r"two EMACallbacks .* write ema.safetensors.*name='slow'"):
        train(gpt2, [EMACallback(0.5), EMACallback(0.6)])
    callback = EMACallback(0.5)
    with pytest.raises(StateError, match="two EMACallbacks"):
        train(gpt2, [callback, callback])
    two = [EMACallback(0.5, name=name, eval_with_ema=True) for name in ("fast", "slow")]
    with pytest.raises(StateError, match=r"two EMACallbacks .* eval_with_ema=True"):
        train(gpt2, two)
    train(gpt2, [EMACallback(0.5)], **SAVING)
    train(gpt2, [EMACallback(0.5)], **SAVING)  # one after the other, in the same folder


def test_a_checkpoint_that_is_written_over_looks_incomplete_meanwhile(gpt2, make_trainer, folder):
    """Killed while a second run saves its step 3, that is no checkpoint with the old average."""
    trainer = make_trainer(gpt2, [EMACallback(0.6)], **SAVING)
    trainer.train()
    trainer = make_trainer(gpt2, [EMACallback(0.6)], **SAVING)
    save = trainer._save_checkpoint
    seen = []

    def interrupted(*args, **kwargs):
        save(*args, **kwargs)
        place = folder / f"checkpoint-{trainer.state.global_step}"
        seen.append(((place / "model.safetensors").exists(), (place / "ema.safetensors").exists()))

    trainer._save_checkpoint = interrupted
    trainer.train()
    assert seen == [(True, False)] * 3


def test_the_last_complete_checkpoint(gpt2, train, folder):
    """What has no whole average, or nothing else, is passed over."""
    assert last_complete_checkpoint(folder) is None
    train(gpt2, [EMACallback(0.6)], **SAVING)
    assert last_complete_checkpoint(str(folder)) == folder / "checkpoint-8"
    average = folder / "checkpoint-8" / "ema.safetensors"
    damaged = bytearray(average.read_bytes())
    damaged[-1] ^= 1
    average.write_bytes(damaged)
    assert last_complete_checkpoint(folder) == folder / "checkpoint-6"
    (folder / "checkpoint-6" / "ema.safetensors").unlink()
    alone = folder / "checkpoint-9"
    alone.mkdir()
    shutil.copy(folder / "checkpoint-3" / "ema.safetensors", alone)
    (folder / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-3"


def test_a_checkpoint_that_is_half_removed_is_not_complete(gpt2, train, folder):
    """Whatever went first; resuming would do without the optimizer and say nothing."""
    train(gpt2, [EMACallback(0.5, name="fast"), EMACallback(0.6)], **SAVING)
    last = folder / "checkpoint-8"
    files = [file for file in last.iterdir() if file.name != "ema-fast.safetensors"]
    assert len(files) >= 8
    for file in files:
        content = file.read_bytes()
        file.unlink()
        assert last_complete_checkpoint(folder) == folder / "checkpoint-6", file.name
        file.write_bytes(content)
    assert last_complete_checkpoint(folder) == last


class Sharded(Trainer):
    """Writes an index as torch.distributed.checkpoint does for shards."""

    def _save_optimizer_and_scheduler(self, folder):
        super()._save_optimizer_and_scheduler(folder)
        (Path(folder) / "optimizer_0").mkdir()
        (Path(folder) / "optimizer_0" / ".metadata").write_bytes(b"")


def test_a_checkpoint_whose_shards_have_lost_their_index_is_not_complete(gpt2, train, folder):
    train(gpt2, [EMACallback(0.6)], kind=Sharded, **SAVING)
    assert last_complete_checkpoint(folder) == folder / "checkpoint-8"
    (folder / "checkpoint-8" / "optimizer_0" / ".metadata").unlink()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-6"


def test_notes_in_the_file_outlive_a_resumed_run(interrupted, new_gpt2, train, folder):
    """What another tool has written into the average of a checkpoint stands in the later ones."""
    interrupted()
    average = EMAModel(new_gpt2(), 0.6)
    average.load(folder / "checkpoint-3")
    average.save(folder / "checkpoint-3", metadata={"author": "somebody"})
    train(new_gpt2(seed=1), [EMACallback(0.6)], resume=True, **SAVING)
    notes = read_state(folder / "checkpoint-8").record.extra
    assert notes["author"] == "somebody"
    assert "model.safetensors" in json.loads(notes["trainer_files"])
