"""The worked example of CONTRIBUTING: a new schedule needs a class, a row, and nothing else."""

import re
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[2]
COPIED = ("ema", "tests", "docs", "README.md", "CONTRIBUTING.md", "pyproject.toml")
COVERING = [
    ("tests/neutral/test_schedules.py", "LinearRamp or table"),
    ("tests/neutral/test_docs.py", "schedule"),
    ("tests/conformance/test_table.py", "LinearRamp"),
    ("tests/conformance/test_bits.py", "LinearRamp"),
    ("tests/conformance/test_weights.py", "LinearRamp"),
]


def blocks():
    """The class, the row of the table and the row of the documentation."""
    _, section = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a schedule\n")
    found = re.findall(r"^   ```\w+\n(.*?)^   ```", section, re.M | re.S)
    return map(textwrap.dedent, found)


def insert(file, before, text):
    content = file.read_text()
    assert content.count(before) == 1, before
    file.write_text(content.replace(before, text + before))


@pytest.fixture
def changed(tmp_path):
    """A copy of the repository with the example in it."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(source, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(source, tmp_path / name)
    new_class, row, row_of_docs = blocks()
    schedules = tmp_path / "ema" / "schedules.py"
    insert(schedules, "EXAMPLES: tuple[Schedule, ...] = (", f"{new_class}\n\n")
    insert(schedules, "    UniformAverage(),\n)", textwrap.indent(row, "    "))
    insert(tmp_path / "docs" / "schedules.md", "| `UniformAverage()`", row_of_docs)
    return tmp_path


@pytest.mark.slow
def test_the_tests_cover_a_new_schedule_without_another_edit(changed):
    for file, chosen in COVERING:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            file,
            "-k",
            chosen,
        ]
        result = processes.run(command, {"PYTHONPATH": str(changed)}, cwd=changed)
        passed = re.search(r"(\d+) passed", result.stdout)
        assert passed, result.stdout
        assert int(passed[1]) > 0
