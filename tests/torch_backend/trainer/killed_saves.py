"""Runs that are killed at every point of their last save, and gone on with; for test_killed.py.

A point is the moment before a change in the output folder. Where that follows the writing of a file
there is another one, in the middle of it: the file is cut in half.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from killed_runs import differences, end, name_of, prepare, start, train
from transformers import modeling_utils

from ema.torch_backend.trainer import last_complete_checkpoint

STEPS = 2
# the only checkpoint is removed before the next one is complete
OPTIONS = {"max_steps": STEPS, "save_total_limit": 1}
THERE_BEFORE = {"os.mkdir": False, "os.rename": True, "os.remove": True, "os.rmdir": True}


class Points:
    """The points of the run in this process, which ends at one of them.

    Args:
        last: the index of the point where it ends, or None.
        torn: whether the file before that point is cut in half.
    """

    def __init__(self, last=None, torn=False):
        self.seen = []  # what comes next, and whether a file was written right before
        self._last, self._torn = last, torn
        self._written = None
        sys.addaudithook(self._look)
        # these two write without Python
        torch.save = self._around(torch.save)
        modeling_utils.safe_save_file = self._around(modeling_utils.safe_save_file)

    def _around(self, write):
        def watched(value, path, *args, **kwargs):
            self._pass(f"write {Path(path).name}", wrote=path)
            write(value, path, *args, **kwargs)

        return watched

    def _look(self, event, args):
        if event == "open":
            path, mode, _ = args
            if mode is not None and mode[0] in "wxa":
                self._pass(f"write {Path(str(path)).name}", wrote=path)
        elif event in THERE_BEFORE:
            path = Path(args[0])
            if path.is_absolute() and path.exists() != THERE_BEFORE[event]:
                return  # nothing will happen
            self._pass(f"{event.removeprefix('os.')} {path.name}")

    def _pass(self, text, wrote=None):
        if not self.seen and text != f"mkdir checkpoint-{STEPS}":
            return  # an earlier save
        if self._last == len(self.seen):
            if self._torn:
                os.truncate(self._written, Path(self._written).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append((text, self._written is not None))
        self._written = wrote


def list_points(config, folder, file):
    points = Points()
    train(config, folder, **OPTIONS)
    file.write_text(json.dumps(points.seen))


def killed(config, folder, last, torn):
    Points(last, torn)
    train(config, folder, **OPTIONS)


def main(config, home):
    prepare()
    whole = home / "whole"
    assert end(start(list_points, config, whole, home / "points.json")) == 0
    expected = torch.load(whole / "result.pt")
    report = {"points": [], "different": [], "failed": []}
    for number, (text, after_a_file) in enumerate(json.loads((home / "points.json").read_text())):
        for torn in (False, True)[: 1 + after_a_file]:
            folder = home / "run"
            assert end(start(killed, config, folder, number, torn)) == -signal.SIGKILL
            last = name_of(last_complete_checkpoint(folder))
            report["points"].append((text, torn, last))
            if code := end(start(train, config, folder, **OPTIONS)):
                report["failed"].append((text, torn, last, code))
            elif different := differences(torch.load(folder / "result.pt"), expected):
                report["different"].append((text, torn, last, different))
            shutil.rmtree(folder)
    print(json.dumps(report))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
