"""Eight devices, which a process has from its start or never: the tests run in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "file", ["eight_devices.py", pytest.param("meshes.py", marks=pytest.mark.slow)]
)
def test_everything_holds_on_eight_devices(file):
    tests = Path(__file__).with_name(file)
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
