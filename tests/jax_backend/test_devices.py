"""Eight devices, which a process has from its start or never: the tests run in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import several_devices


@pytest.mark.parametrize(
    "file", ["eight_devices.py", pytest.param("meshes.py", marks=pytest.mark.slow)]
)
def test_everything_holds_on_eight_devices(file):
    tests = Path(__file__).with_name(file)
    env = os.environ | several_devices(8)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
