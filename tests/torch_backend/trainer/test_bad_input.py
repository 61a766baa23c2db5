"""Damaged, foreign and half-written checkpoints: one clear error, and nothing lost."""

import resource
import shutil

import pytest
import safetensors.torch
import torch
from transformers import TrainerCallback

from ema import ArgumentError, ArgumentTypeError, CheckpointError, EMACallback
from ema.torch_backend import EMAModel
from ema.torch_backend.trainer import last_complete_checkpoint
from tests.torch_helpers import assert_same

SAVING = {"steps": 8, "save_strategy": "steps", "save_steps": 3}


@pytest.fixture
def average(gpt2, train, folder):
    """The average of step 3, the last one of a run."""
    train(gpt2, [EMACallback(0.6)], **SAVING)
    for later in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(folder / later)
    return folder / "checkpoint-3" / "ema.safetensors"


def truncate(file, new_gpt2):
    file.write_bytes(file.read_bytes()[:-7])


def empty(file, new_gpt2):
    file.write_bytes(b"")


def alter(file, new_gpt2):
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)


def replace(file, new_gpt2):
    EMAModel(new_gpt2(n_embd=8), 0.6).save(file)


def plain(file, new_gpt2):
    safetensors.torch.save_file({"x": torch.zeros(2)}, file)


@pytest.mark.parametrize(
    ("damage", "message", "attached"),
    [
        (truncate, "checkpoint-3/ema.safetensors: ", False),
        (empty, "checkpoint-3/ema.safetensors: ", False),
        (alter, "differs from its digest", False),
        (alter, "differs from its digest", True),
        (replace, r"has shape \(16, 48\), the state has \(8, 24\)", True),
        (plain, "checkpoint-3/ema.safetensors: ", False),
    ],
)
def test_an_average_that_cannot_be_gone_on_with(
    average, new_gpt2, make_trainer, damage, message, attached
):
    """Refused before the first step, with the file and the reason; never warned away."""
    damage(average, new_gpt2)
    callback = EMACallback(0.6)
    trainer = make_trainer(new_gpt2(), [callback], **SAVING)
    if attached:
        callback.attach(trainer)
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert callback.ema_model.count == 0


class FullDisk(TrainerCallback):
    """From step 6 on no file gets beyond 4 KiB."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 6:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))


def test_a_disk_that_is_full_during_a_save(gpt2, new_gpt2, train, folder):
    """The previous checkpoint stays whole, nothing half-written is left, the run goes on from it."""
    whole = EMACallback(0.6)
    train(gpt2, [whole], **SAVING)
    shutil.rmtree(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-6/ema.safetensors: cannot be writ"):
            train(new_gpt2(), [FullDisk(), EMACallback(0.6)], **SAVING)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "checkpoint-6" / "trainer_state.json").exists()
    assert not [file.name for file in (folder / "checkpoint-6").iterdir() if "ema" in file.name]
    last = last_complete_checkpoint(folder)
    assert last == folder / "checkpoint-3"
    callback = EMACallback(0.6)
    train(new_gpt2(seed=1), [callback], resume=str(last), **SAVING)
    ours, theirs = callback.get_ema_state(), whole.get_ema_state()
    assert (ours["step"], ours["count"]) == (8, 8)
    assert_same(ours["averages"], theirs["averages"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eval_with_ema": 1}, ArgumentTypeError, "`eval_with_ema` must be True or False, got 1"),
        ({"decay": {"a": 0.5}}, ArgumentTypeError, "for several averages use several callbacks"),
        ({"save_ema_model": "x"}, ArgumentTypeError, "`save_ema_model` must be True or False"),
        ({"on_missing_average": "ask"}, ArgumentError, "must be 'warn' or 'error', got 'ask'"),
        ({"name": "a/b"}, ArgumentError, "`name` must be an identifier, got 'a/b'"),
        ({"name": ""}, ArgumentError, "`name` must be an identifier, got ''"),
        ({"update_every": 0}, ArgumentError, "`update_every`"),
        ({"buffers": "keep"}, ArgumentError, "`buffers`"),
    ],
    ids=str,
)
def test_arguments(options, error, message):
    """Each is checked when the callback is made."""
    with pytest.raises(error, match=message):
        EMACallback(**{"decay": 0.6, **options})
