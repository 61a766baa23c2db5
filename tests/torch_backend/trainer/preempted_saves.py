"""Runs that are killed at every point of the save that SIGTERM asks for; for test_preempted.py."""

import json
import shutil
import signal
import sys
from pathlib import Path

import torch
from killed_runs import differences, end, name_of, prepare, start
from killed_saves import STEPS, Points
from preempted_runs import InFront, train

from ema.torch_backend.trainer import last_complete_checkpoint

# a checkpoint from before there is, and a step that comes after
OPTIONS = {"max_steps": STEPS + 1, "save_strategy": "steps", "save_steps": 1}


def ask(manager):
    """What the handler of the signal does in the end."""
    manager.is_checkpoint_requested = True


def preempted(config, folder, attached, last=None, torn=False):
    """Save at the end of a step, without the event of a save; until that point, if there is one."""
    points = Points(last, torn)
    front = InFront("on_step_end", STEPS, ask)
    train(config, folder, attached=attached, front=front, **OPTIONS)
    return points


def list_points(config, folder, attached, file):
    file.write_text(json.dumps(preempted(config, folder, attached).seen))


def main(config, home, attached):
    prepare()
    whole, listing = home / "whole", home / "points.json"
    assert end(start(train, config, whole, attached=attached, **OPTIONS)) == 0
    expected = torch.load(whole / "result.pt")
    assert end(start(list_points, config, home / "listed", attached, listing)) == 0
    report = {"points": [], "different": [], "failed": []}
    for number, (text, after_a_file) in enumerate(json.loads(listing.read_text())):
        for torn in (False, True)[: 1 + after_a_file]:
            folder = home / "run"
            killed = start(preempted, config, folder, attached, number, torn)
            assert end(killed) == -signal.SIGKILL
            last = name_of(last_complete_checkpoint(folder))
            report["points"].append((text, torn, last))
            if code := end(start(train, config, folder, attached=attached, **OPTIONS)):
                report["failed"].append((text, torn, last, code))
            elif different := differences(torch.load(folder / "result.pt"), expected):
                report["different"].append((text, torn, last, different))
            shutil.rmtree(folder)
    print(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), attached=sys.argv[3] == "attached")
