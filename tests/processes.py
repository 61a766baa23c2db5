"""Other processes for tests: each has a limit of time, and says where it stood when it reached it."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

LIMIT = 1200
"""Seconds: ends what hangs. The slowest needs 75 on an idle machine."""

ROOT = Path(__file__).parents[1]


def environment_with(changes: Mapping[str, str | None]) -> dict[str, str]:
    """The environment of this process, with this checkout in its path and ``changes``.

    None removes a name.
    """
    names = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",  # SIGABRT prints the stack of each thread
        **changes,
    }
    return {name: value for name, value in names.items() if value is not None}


def run(
    command: Sequence[object],
    environment: Mapping[str, str | None] | None = None,
    *,
    cwd: Path | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a group of its own, and keep its output.

    The test fails where the command does (unless ``check`` is False), or takes more than ``LIMIT``.
    """
    words = list(map(str, command))
    with subprocess.Popen(
        words,
        env=environment_with(environment or {}),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            end_group(process)
            output, errors = process.communicate()
            pytest.fail(f"{words} did not end within {LIMIT} s:\n{output[-4000:]}{errors[-8000:]}")
        except BaseException:
            end_group(process)
            raise
    done = subprocess.CompletedProcess(words, process.returncode, output, errors)
    if check and done.returncode:
        pytest.fail(f"{words} ended with {done.returncode}:\n{output[-4000:]}{errors[-8000:]}")
    return done


def end_group(process: subprocess.Popen[str]) -> None:
    """Let a process and all that it has started print their stacks, then kill them."""
    for each in (signal.SIGABRT, signal.SIGKILL) if hasattr(signal, "SIGKILL") else ():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, each)
            if each is signal.SIGABRT:
                time.sleep(2)
    process.kill()


def run_together(
    commands: Sequence[Sequence[object]],
    logs: Sequence[Path],
    environment: Mapping[str, str | None] | None = None,
    *,
    may_fail: Sequence[int] = (),
) -> None:
    """Run several commands at a time, each with a file for its output, to their ends.

    The test fails where one of them does, unless ``may_fail`` has its place, or where ``LIMIT`` is
    over; the others are killed then, for they would wait for that one.
    """
    limit = time.monotonic() + LIMIT
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("wb") as stream:
                words, names = list(map(str, command)), environment_with(environment or {})
                processes.append(subprocess.Popen(words, env=names, stdout=stream, stderr=stream))
        failed, late = _first_failures(processes, may_fail, limit)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if failed:
        texts = [f"process {i}:\n{logs[i].read_text()[-6000:]}" for i in failed]
        pytest.fail("\n".join([f"after {LIMIT} s there still ran", *texts] if late else texts))


def _first_failures(
    processes: Sequence[subprocess.Popen[bytes]], may_fail: Sequence[int], limit: float
) -> tuple[list[int], bool]:
    """Which have failed first, or have not ended in time; those print their stacks."""
    while time.monotonic() < limit:
        codes = [process.poll() for process in processes]
        failed = [i for i, code in enumerate(codes) if code and i not in may_fail]
        if failed or None not in codes:
            return failed, False
        time.sleep(0.1)
    failed = [i for i, process in enumerate(processes) if process.poll() is None]
    for i in failed:
        processes[i].send_signal(signal.SIGABRT)
    time.sleep(2)
    return failed, True
