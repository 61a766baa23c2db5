"""Two real processes with ``jax.distributed``, beside one alone."""

from __future__ import annotations

import runpy
import socket
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ema.jax_backend import load_params_ema, save_params_ema
from tests import processes
from tests.devices import several_devices

PROGRAM = Path(__file__).with_name("processes.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes have left."""
    path = tmp_path_factory.mktemp("processes")
    with socket.socket() as held:  # no other program gets the port; JAX shares it, as gRPC does
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        run(path, held.getsockname()[1])
    return path


def run(path, port):
    """Both processes to their end; if one fails, the other is ended."""
    commands = [[sys.executable, PROGRAM, index, port, path] for index in (0, 1)]
    outputs = [path / f"output {index}" for index in (0, 1)]
    processes.run_together(commands, outputs, several_devices(2))


def narrowed(wide, dtype):
    """What complex64 holds beside zeros, in its own dtype."""
    return jnp.asarray(wide if dtype == wide.dtype else wide.real.astype(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "precise", "narrow"])
def test_two_processes_write_the_file_of_one(kind, folder, tmp_path):
    """Of the same parameters, byte for byte; and it loads in one."""
    program = runpy.run_path(str(PROGRAM))
    tx, seen = program["average"](kind), np.load(folder / kind / "seen.npz")
    params = jax.tree.map(jnp.asarray, program["start"]())
    state = tx.init(params)
    untouched = jax.tree.map(lambda _: None, params)
    update = jax.jit(tx.update)
    for k in range(program["STEPS"]):
        params = {n: narrowed(seen[f"{k}/{n}"], p.dtype) for n, p in params.items()}
        _, state = update(untouched, state, params)
    loaded = tx.init(params)
    for name in program["DECAYS"]:
        file = save_params_ema(tmp_path / name, state, name)
        theirs = folder / kind / name / file.name
        assert file.read_bytes() == theirs.read_bytes()
        loaded = load_params_ema(theirs, loaded, name)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
