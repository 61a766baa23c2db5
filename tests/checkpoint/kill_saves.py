"""Saves that are killed, in processes of their own: run by ``test_killed_saves.py``.

A state of step ``k`` holds the number ``k`` in every element, so a mixture of two is seen. Two
steps of four are split over several files, so that each form follows itself and the other.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np

from ema.checkpoint import Record, Source, read_state, write_state, writer
from tests.points import Points, kill_at

SHAPES = {"a": (64, 256), "b": (300,), "c": (64, 128)}


def save(folder, step):
    sources = {
        name: Source("F32", shape, np.full(shape, step, np.float32).tobytes)
        for name, shape in SHAPES.items()
    }
    limit = 40_000 if step % 4 in (1, 2) else 10**9
    write_state(folder, Record(step=step, count=step), sources, max_shard_size=limit)


def step_of(folder):
    """The step of a state that is whole."""
    state = read_state(folder)
    for tensor in state.tensors.values():
        values = np.frombuffer(tensor.bytes(), np.float32)
        assert (values == state.record.step).all(), state.record.step
    assert state.tensors.keys() == SHAPES.keys()
    return state.record.step


def in_child(run):
    """Run in a fork and give its process id."""
    child = os.fork()
    if not child:
        try:
            run()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(3)
        os._exit(0)
    return child


def kill_at_random(folder, rounds):
    """Kill an endless loop of saves, ``rounds`` times; what is there goes on from there."""
    rng = random.Random(0)
    writer._CHUNK = 4096  # so that there are lines between the parts of a tensor
    with Points() as points:
        for step in range(4):
            save(folder, step)
    advanced = interrupted = 0
    for _ in range(rounds):
        before, point = step_of(folder), rng.randrange(points.passed // 2)

        def loop(step=before, point=point):
            with Points(kill_at(point)):
                while True:
                    step += 1
                    save(folder, step)

        _, status = os.waitpid(in_child(loop), 0)
        assert os.WIFSIGNALED(status), status
        after = step_of(folder)
        assert after >= before
        advanced += after > before
        index = Path(folder, "ema.safetensors.index.json")
        named = (
            set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else set()
        )
        state = {"ema.safetensors", index.name, *named}
        interrupted += any(file.name not in state for file in Path(folder).iterdir())
    return {"rounds": rounds, "advanced": advanced, "interrupted": interrupted}


def kill_at_every_call(folder):
    """Kill before and after each call that changes the disk, in each transition of forms."""
    seen = []
    for first, second in ((0, 3), (0, 1), (1, 2), (2, 3)):
        point = 0
        while True:
            for file in Path(folder).iterdir():
                file.unlink()
            save(folder, first)
            child = in_child(lambda point=point, second=second: armed(folder, second, point))
            _, status = os.waitpid(child, 0)
            step = step_of(folder)
            assert step in (first, second)
            if not os.WIFSIGNALED(status):
                assert os.WEXITSTATUS(status) == 0, status
                assert step == second
                break
            seen.append(step == second)
            point += 1
        save(folder, second)
        left = {file.name for file in Path(folder).iterdir()}
        expected = {1: 3, 2: 3, 3: 1}[second]
        assert len(left) == expected, left
    return {"points": len(seen), "old": seen.count(False), "new": seen.count(True)}


def read_meanwhile(folder, rounds):
    """Read while another process saves, at one to three random lines of each read."""
    rng = random.Random(0)
    newest = 1
    save(folder, newest)
    with Points() as points:
        step_of(folder)
    orders, answers = multiprocessing.Pipe()
    child = in_child(lambda: save_when_told(folder, answers))
    seen = []

    def read():
        nonlocal newest
        oldest, lines = newest, rng.choices(range(points.passed), k=rng.randint(1, 3))

        def act(number):
            nonlocal newest
            if number in lines:
                newest += 1
                orders.send(newest)
                assert orders.recv() == newest

        with Points(act):
            found = step_of(folder)
        assert oldest <= found <= newest, (oldest, found, newest)
        seen.append(found > oldest)

    try:
        for _ in range(rounds):
            read()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return {"old": seen.count(False), "new": seen.count(True)}


def save_when_told(folder, answers):
    """Save the steps that come through the connection."""
    while True:
        step = answers.recv()
        save(folder, step)
        answers.send(step)


def armed(folder, step, point):
    """Save, and be killed at the call number ``point`` that changes the disk."""
    left = point

    def arm(owner, name):
        call = getattr(owner, name)

        def killed(*args, **kwargs):
            nonlocal left
            for when in (0, 1):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                if not when:
                    result = call(*args, **kwargs)
            return result

        setattr(owner, name, killed)

    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
        arm(owner, name)
    save(folder, step)


if __name__ == "__main__":
    folder, what, *rounds = sys.argv[1:]
    calls = {"random": kill_at_random, "calls": kill_at_every_call, "read": read_meanwhile}
    print(json.dumps(calls[what](folder, *map(int, rounds))))
