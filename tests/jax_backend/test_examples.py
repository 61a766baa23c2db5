"""The worked examples run, as a user runs them, and the teacher has learned."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests import processes

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["jax_teacher", "torch_teacher"])
def test_teacher(name):
    """The labels alone give 82 %; in a process of its own, under jit as any user has it."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = processes.run(command)
    shares = dict(re.findall(r"(\w+): ([\d.]+) %", done.stdout))
    assert shares.keys() == {"student", "teacher"}
    assert float(shares["teacher"]) > 79.0
