"""Runs that get SIGTERM under ``enable_jit_checkpoint``, and are gone on with; for test_preempted.py.

Each run is a process of its own, a fork of this one. It says through a pipe that it is in a certain
event of a certain step, gets the signal, and waits in the event until the Trainer's own handler has asked
for a checkpoint, which is then written in the same event.
"""

import json
import os
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from killed_runs import differences, end, name_of, prepare, start
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from ema import EMACallback, HalfLife
from ema.torch_backend.trainer import last_complete_checkpoint

STEPS = 8  # four make an epoch
READY, SEEN = b"r", b"s"
CASES = [  # event, step, whether the model drops out
    ("on_step_begin", 0, False),
    ("on_step_begin", 3, True),
    ("on_pre_optimizer_step", 0, False),
    ("on_pre_optimizer_step", 3, False),
    ("on_step_end", 3, True),
    ("on_epoch_end", 4, True),
]
"""Without dropout where the Trainer, resumed, draws other random numbers for the step that it repeats.

It saves before the optimizer's step, and so after the forward pass has drawn some; and it puts back those of the
first step of an epoch before the epoch has drawn its own.
"""


class InFront(TrainerCallback):
    """Does something with the Trainer's handler in one event of one step, right before that looks."""

    def __init__(self, event, step, act):
        self.manager = None

        def told(args, state, control, **kwargs):
            if state.global_step == step:
                act(self.manager)

        setattr(self, event, told)


def waiting_for_signal(tell):
    """What the run does that gets the signal: it says that it is ready, and that it was seen."""

    def wait(manager):
        manager.kill_wait = 0  # seconds from a signal to the checkpoint that it asks for
        os.write(tell, READY)
        while not manager.is_checkpoint_requested or timers():
            time.sleep(0.001)
        os.write(tell, SEEN)

    return wait


def timers():
    """Those that will ask for a checkpoint: one for each signal that has come before the first did."""
    return any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def manager_of(trainer):
    return next(
        callback.jit_manager
        for callback in trainer.callback_handler.callbacks
        if hasattr(callback, "jit_manager")
    )


def train(config, folder, *, attached, front=None, **options):
    """Go on from the last complete checkpoint to the end, and write down where that is."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**config))
    rows = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(0))
    callback = EMACallback(HalfLife(steps=2), update_every=2)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            enable_jit_checkpoint=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **{"max_steps": STEPS, "save_strategy": "no", **options},
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[callback],
    )
    if attached:
        callback.attach(trainer)
    if front is not None:
        front.manager = manager_of(trainer)
        trainer.callback_handler.callbacks.insert(0, front)
    last = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    result = {
        "weights": model.state_dict(),
        "average": callback.get_ema_state(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "steps": trainer.state.global_step,
    }
    torch.save(result, folder / "result.pt")


def preempt(config, folder, event, step, *, attached):
    """Run until the signal, and what becomes of it."""
    told, tell = os.pipe()
    front = InFront(event, step, waiting_for_signal(tell))
    pid = start(train, config, folder, attached=attached, front=front)
    os.close(tell)
    if os.read(told, 1) == READY:
        os.kill(pid, signal.SIGTERM)
        while not select.select([told], [], [], 1)[0]:  # seen, or the end of the process
            os.kill(pid, signal.SIGTERM)
    os.close(told)
    return end(pid)


def main(config, home):
    prepare()
    plain = {**config, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    expected = {}
    for drops in (False, True):
        whole = home / f"whole{drops}"
        assert end(start(train, config if drops else plain, whole, attached=False)) == 0
        expected[drops] = torch.load(whole / "result.pt")
    report = {"checkpoints": {}, "failed": [], "different": []}
    for attached in (False, True):
        for event, step, drops in CASES:
            case, folder = f"{event} {step} {'attached' if attached else 'alone'}", home / "run"
            options = config if drops else plain
            code = preempt(options, folder, event, step, attached=attached)
            report["checkpoints"][case] = name_of(last_complete_checkpoint(folder))
            code = code or end(start(train, options, folder, attached=attached))
            if code:
                report["failed"].append((case, code))
            elif different := differences(torch.load(folder / "result.pt"), expected[drops]):
                report["different"].append((case, different))
            shutil.rmtree(folder)
    print(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
