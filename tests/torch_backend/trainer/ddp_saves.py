"""One process of runs under torchrun that save without an event; for test_ddp.py."""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from ddp_program import Recorder
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from ema import EMACallback, EMAModel
from ema.torch_backend.trainer import last_complete_checkpoint

STEP = 2


class OnSignal(TrainerCallback):
    """Asks the Trainer's handler for a checkpoint, in all processes in the same event."""

    def __init__(self, event):
        setattr(self, event, self._ask)

    def _ask(self, args, state, control, **kwargs):
        if state.global_step == STEP:
            handler = next(c for c in self.trainer.callback_handler.callbacks if _has_manager(c))
            handler.jit_manager.is_checkpoint_requested = True


class ByHand(OnSignal):
    """Saves a checkpoint itself, in all processes."""

    def _ask(self, args, state, control, **kwargs):
        if state.global_step == STEP:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)


def _has_manager(callback):
    return getattr(callback, "jit_manager", None) is not None


def run(config, folder, saver, *, attached):
    """What came of it: the file, whether it is that by hand, its list, and what was warned of."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**config))
    rows = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(0))
    record, callback = Recorder(), EMACallback(0.5)
    trainer = saver.trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_strategy="no",
            enable_jit_checkpoint=True,
            report_to=[],
            use_cpu=True,
            ddp_backend="gloo",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[record, callback],
    )
    trainer.callback_handler.callbacks.insert(0, saver)
    if attached:
        callback.attach(trainer)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    dist.barrier()
    return {
        "complete": last_complete_checkpoint(folder) == folder / f"checkpoint-{STEP}",
        "right": _is_right(model, folder / f"checkpoint-{STEP}", record),
        "warned": [str(w.message) for w in seen if "without an event" in str(w.message)],
    }


def _is_right(model, checkpoint, record):
    file = checkpoint / "ema.safetensors"
    if not file.exists():
        return None
    stored = EMAModel(model, 0.5)
    stored.load(file)
    average = {name: value.clone() for name, value in record.history[0].items()}
    for live in record.history[1 : STEP + 1]:
        for name, value in live.items():
            average[name].lerp_(value, 0.5)
    names = json.loads(stored._file_metadata["trainer_files"])
    ours = stored.averaged_parameters()
    same = all(torch.equal(ours[name], average[name]) for name in average)
    return same and {"rng_state_0.pth", "rng_state_1.pth"} <= set(names)


def main(config, home):
    result = {
        f"{kind.__name__} {event} {'attached' if attached else 'alone'}": run(
            config, home / f"{kind.__name__}{event}{attached}", kind(event), attached=attached
        )
        for kind in (OnSignal, ByHand)
        for event in ("on_step_begin", "on_step_end")
        for attached in (False, True)
    }
    torch.save(result, home / f"rank{os.environ['RANK']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
