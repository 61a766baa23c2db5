"""A run that is killed goes on from its last complete checkpoint as if it had not been."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("killed_runs.py")


# One of some 140 kills ended with other bits, for a reason not found yet: issue 3 is open on it.
@pytest.mark.xfail(strict=False, reason="a killed run was once seen to end with other bits")
@pytest.mark.slow
def test_killed_at_twenty_random_moments(config, tmp_path):
    """SIGKILL, some of them in the middle of a save; weights, average and counters are the same."""
    command = [sys.executable, str(PROGRAM), json.dumps(config), str(tmp_path), "20", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["killed"], report["failed"], report["different"]) == (20, [], [])
    assert report["torn"] >= 1
