"""A save that is killed leaves the old state or the new one, whole."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from tests import processes

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL and fork")

SCRIPT = Path(__file__).with_name("kill_saves.py")


def run(folder, *what):
    return json.loads(processes.run([sys.executable, SCRIPT, folder, *what]).stdout)


def test_killed_at_200_random_points(tmp_path):
    """Before any line of Python, with a part of a tensor in the file or none."""
    found = run(tmp_path, "random", "200")
    assert found["rounds"] == 200
    assert found["advanced"] > 20  # some saves came to their end
    assert found["interrupted"] > 20  # and some left files behind


def test_killed_before_and_after_every_call_that_changes_the_disk(tmp_path):
    """Between write and rename, and between the renaming of the index and the end of old files."""
    found = run(tmp_path, "calls")
    assert found["points"] > 40
    assert found["old"] > 10
    assert found["new"] > 10


def test_a_reader_beside_a_writer_sees_whole_states(tmp_path):
    """The writer saves up to three times while one state is read, at any line of the reader."""
    found = run(tmp_path, "read", "1500")
    assert found["old"] > 100
    assert found["new"] > 100
