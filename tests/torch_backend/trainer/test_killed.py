"""A run that is killed goes on from its last complete checkpoint as if it had not been."""

import json
import sys
from pathlib import Path

import pytest

from tests import processes


@pytest.fixture
def report(config, tmp_path):
    """Run a program that kills, and read what it has seen."""

    def run(program, *args):
        path = Path(__file__).with_name(program)
        command = [sys.executable, str(path), json.dumps(config), str(tmp_path), *args]
        return json.loads(processes.run(command).stdout.splitlines()[-1])

    return run


@pytest.mark.slow
def test_killed_at_twenty_random_points(report):
    """SIGKILL, half of them in the middle of a save; weights, average and counters are the same."""
    seen = report("killed_runs.py", "20", "0")
    assert (seen["killed"], seen["failed"], seen["different"]) == (20, [], [])
    assert seen["torn"] >= 5


@pytest.mark.slow
def test_killed_at_every_point_of_a_save(report):
    """Before and in the middle of each file; while the old checkpoint goes; and at the very end."""
    seen = report("killed_saves.py")
    assert (seen["failed"], seen["different"]) == ([], [])
    resumed_from = {text: last for text, torn, last in seen["points"] if not torn}
    for file in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        assert resumed_from[f"write {file}"] == "checkpoint-1"
        assert f"remove {file}" in resumed_from
    assert resumed_from["rmdir checkpoint-1"] is None
    assert resumed_from["write result.pt"] == "checkpoint-2"
    assert sum(torn for _, torn, _ in seen["points"]) >= 8
