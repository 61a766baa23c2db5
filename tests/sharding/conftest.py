"""Runs over several processes, each made once for all the tests that look at it."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import processes

HOME = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def launch(scenario, ranks, folder, may_fail=(), **environment):
    """Run ``program.py`` on so many ranks; what each of them reports, None for one that was killed."""
    logs = [folder / f"{scenario}-{ranks}-rank{rank}.log" for rank in range(ranks)]
    commands = [
        [sys.executable, HOME / "program.py", scenario, rank, ranks, folder]
        for rank in range(ranks)
    ]
    processes.run_together(commands, logs, {**ENVIRONMENT, **environment}, may_fail=may_fail)
    reports = [folder / f"{scenario}-{ranks}-rank{rank}.json" for rank in range(ranks)]
    return [json.loads(report.read_text()) if report.exists() else None for report in reports]


@pytest.fixture(scope="session")
def start() -> Callable[..., list]:
    """The function that runs the program."""
    return launch


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[..., Path]:
    """Fill a folder by a function of it, in one of the processes of pytest-xdist; all get it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name, fill):
        folder, end = base / name, base / f"{name}.end"
        try:
            folder.mkdir()
        except FileExistsError:
            while not end.exists():
                time.sleep(0.2)
        else:
            message = "it was interrupted"
            try:
                fill(folder)
                message = ""
            finally:
                end.with_suffix(".tmp").write_text(message)
                end.with_suffix(".tmp").replace(end)
        if end.read_text():
            pytest.fail(f"{name} has failed in another process of pytest")
        return folder

    return make


@pytest.fixture(scope="session")
def shared(once) -> Path:
    """Where four ranks save and others go on, and what all of them have found."""

    def fill(folder):
        runs = {ranks: launch("all", ranks, folder) for ranks in (4, 3, 2, 1)}
        (folder / "runs.json").write_text(json.dumps(runs))

    return once("shards", fill)


@pytest.fixture(scope="session")
def runs(shared) -> dict[int, list]:
    """What each rank has found, by the number of ranks; four come first, the others resume."""
    return {int(ranks): r for ranks, r in json.loads((shared / "runs.json").read_text()).items()}


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
