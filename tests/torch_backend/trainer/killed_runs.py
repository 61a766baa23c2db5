"""Runs that are killed at random moments, and gone on with; for test_killed.py.

Everything is imported once, here; each run is a fork of this process, which never computes itself.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ema import EMACallback
from ema.torch_backend.trainer import last_complete_checkpoint


def train(config, folder):
    """Go on from the last complete checkpoint to the end, and write down where that is."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**config))
    rows = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(0))
    callback = EMACallback(0.6, update_every=2)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            max_steps=10,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[callback],
    )
    last = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    result = {"weights": model.state_dict(), "average": callback.get_ema_state()}
    torch.save(result, folder / "result.pt")


def start(config, folder):
    """A process that trains."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(config, folder)
            code = 0
        finally:
            os._exit(code)
    return pid


def end(pid):
    """How it ended: an exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def equal(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[k], theirs[k]) for k in ours)
    return ours == theirs


def main(config, home, moments, seed):
    chance = random.Random(seed)
    whole = home / "whole"
    assert end(start(config, whole)) == 0  # the first one warms up
    shutil.rmtree(whole)
    begun = time.monotonic()
    assert end(start(config, whole)) == 0
    took = time.monotonic() - begun
    expected = torch.load(whole / "result.pt")
    report = {"killed": 0, "torn": 0, "different": [], "failed": []}
    attempts = 0
    while report["killed"] < moments and attempts < 3 * moments:
        attempts += 1
        folder = home / f"run{attempts}"
        pid = start(config, folder)
        time.sleep(chance.uniform(0.05, 1.0) * took)
        os.kill(pid, signal.SIGKILL)
        if end(pid) == 0:
            continue  # it had finished
        report["killed"] += 1
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        report["torn"] += bool(found) and found[-1] != last_complete_checkpoint(folder)
        if code := end(start(config, folder)):
            report["failed"].append(code)
        elif not equal(torch.load(folder / "result.pt"), expected):
            report["different"].append(attempts)
        shutil.rmtree(folder)
    print(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
