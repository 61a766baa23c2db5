"""Eight devices, which a process has from its start or never: the tests run in one of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import processes
from tests.devices import several_devices


@pytest.mark.parametrize(
    "file", ["eight_devices.py", pytest.param("meshes.py", marks=pytest.mark.slow)]
)
def test_everything_holds_on_eight_devices(file):
    tests = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    processes.run(command, several_devices(8))
