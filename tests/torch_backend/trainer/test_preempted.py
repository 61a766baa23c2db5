"""A run that gets SIGTERM under ``enable_jit_checkpoint`` goes on from there as if it had not."""

import json
import sys
from pathlib import Path

import pytest

from tests import processes


@pytest.fixture
def report(config, tmp_path):
    """Run a program of preempted runs, and read what it has seen."""

    def run(program, *args):
        path = Path(__file__).with_name(program)
        command = [sys.executable, str(path), json.dumps(config), str(tmp_path), *args]
        return json.loads(processes.run(command).stdout.splitlines()[-1])

    return run


@pytest.mark.slow
def test_sigterm_in_every_event_in_which_the_trainer_saves(report):
    """Weights, averages, optimizer and counters are the same bit for bit, alone and attached."""
    seen = report("preempted_runs.py")
    assert (seen["failed"], seen["different"]) == ([], [])
    assert len(seen["checkpoints"]) == 12
    for case, checkpoint in seen["checkpoints"].items():
        assert checkpoint == f"checkpoint-{case.split()[1]}", case


@pytest.mark.slow
@pytest.mark.parametrize("way", ["alone", "attached"])
def test_killed_at_every_point_of_that_save(report, way):
    """A folder passes for complete when all files are whole and the Trainer has taken its mark away."""
    seen = report("preempted_saves.py", way)
    assert (seen["failed"], seen["different"]) == ([], [])
    points = [(text, last) for text, _, last in seen["points"]]
    assert points[-1] == ("write result.pt", "checkpoint-2")
    assert {last for _, last in points[:-1]} == {"checkpoint-1"}
    texts = [text for text, _ in points]
    ours = next(text for text in texts if text.startswith("rename .ema.safetensors"))
    order = [texts.index(ours), texts.index("remove checkpoint-is-incomplete.txt")]
    assert (order == sorted(order)) is (way == "attached")
    assert sum(torn for _, torn, _ in seen["points"]) >= 8
