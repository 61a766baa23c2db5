"""Runs that are killed at random points, and gone on with; for test_killed.py.

Everything is imported once, here; each run is a fork of this process, which never computes itself.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ema import EMACallback
from ema.torch_backend.trainer import last_complete_checkpoint
from tests.points import Points, kill_at

STEPS = 10


def train(config, folder, *, attached=True, kind=Trainer, **options):
    """Go on from the last complete checkpoint to the end, and write down where that is."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**config))
    rows = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(0))
    callback = EMACallback(0.6, update_every=2)
    defaults = {"max_steps": STEPS, "save_total_limit": 2}
    trainer = kind(
        model=model,
        args=TrainingArguments(
            str(folder),
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **{**defaults, **options},
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[callback],
    )
    if attached:
        callback.attach(trainer)
    last = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    result = {
        "weights": model.state_dict(),
        "average": callback.get_ema_state(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "steps": trainer.state.global_step,
    }
    torch.save(result, folder / "result.pt")


def start(run, *args, **options):
    """A process that calls ``run``."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(*args, **options)
            code = 0
        finally:
            os._exit(code)
    return pid


def end(pid):
    """How it ended: an exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def prepare():
    """The Trainer collects garbage; what is here now is none, in any fork."""
    gc.collect()
    gc.freeze()


def differences(ours, theirs, path="result"):
    """What is not the same, bit for bit, and by how much."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return [
            text for key in ours for text in differences(ours[key], theirs[key], f"{path}.{key}")
        ]
    if isinstance(ours, torch.Tensor):
        far = (ours.double() - theirs.double()).abs().max().item()
        return [] if torch.equal(ours, theirs) else [f"{path}: by {far:.2g}"]
    return [] if ours == theirs else [f"{path}: {ours} and {theirs}"]


def name_of(checkpoint):
    """For the report."""
    return None if checkpoint is None else checkpoint.name


def measure(config, folder, attached):
    """A whole run, and the points where it begins, where each save begins and ends, and its end."""
    bounds = [0]

    class Watched(Trainer):
        def _save_checkpoint(self, *args, **kwargs):
            bounds.append(points.passed)
            super()._save_checkpoint(*args, **kwargs)
            bounds.append(points.passed)

    with Points(lines=False) as points:
        train(config, folder, attached=attached, kind=Watched)
    if attached:
        bounds.append(points.passed)
    else:  # alone, the Trainer would take another step once the last save is complete
        bounds.pop()
    (folder / "bounds.json").write_text(json.dumps(bounds))


def killed(config, folder, attached, point):
    with Points(kill_at(point), lines=False):
        train(config, folder, attached=attached)
    os.kill(
        os.getpid(), signal.SIGKILL
    )  # it has passed fewer points than the one that was measured


def main(config, home, moments, seed):
    prepare()
    chance = random.Random(seed)
    parts = {}
    for attached in (False, True):
        whole = home / f"whole{attached:d}"
        assert end(start(measure, config, whole, attached)) == 0
        parts[attached] = list(pairwise(json.loads((whole / "bounds.json").read_text())))
    expected = torch.load(home / "whole1" / "result.pt")
    assert differences(torch.load(home / "whole0" / "result.pt"), expected) == []
    report = {"killed": 0, "torn": 0, "different": [], "failed": []}
    for number in range(moments):
        attached, in_a_save = number % 2 == 0, number % 4 < 2
        point = chance.randrange(*chance.choice(parts[attached][in_a_save::2]))
        folder = home / f"run{number}"
        report["killed"] += end(start(killed, config, folder, attached, point)) == -signal.SIGKILL
        last = name_of(last_complete_checkpoint(folder))
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        report["torn"] += bool(found) and found[-1].name != last
        if code := end(start(train, config, folder, attached=attached)):
            report["failed"].append((number, point, last, code))
        elif different := differences(torch.load(folder / "result.pt"), expected):
            report["different"].append((number, point, last, different))
        shutil.rmtree(folder)
    print(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
