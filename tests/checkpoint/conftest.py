"""States without a framework, which the tests of the file format share."""

from __future__ import annotations

import json

import numpy as np
import pytest

import ema
from ema.checkpoint import Record, Source, read_state

DTYPES = {"F32": np.float32, "F64": np.float64, "C64": np.complex64, "C128": np.complex128}


@pytest.fixture
def sources_of():
    """What the writer takes for NumPy arrays."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

    def sources(arrays):
        return {
            name: Source(names[array.dtype], array.shape, array.tobytes)
            for name, array in arrays.items()
        }

    return sources


@pytest.fixture
def arrays_of():
    """The tensors of a file as NumPy arrays of their own memory."""

    def arrays(path):
        return {
            name: np.frombuffer(bytes(tensor.bytes()), DTYPES[tensor.dtype]).reshape(tensor.shape)
            for name, tensor in read_state(path).tensors.items()
        }

    return arrays


@pytest.fixture
def arrays():
    """A small state of several dtypes and shapes, of one without elements and one scalar."""
    rng = np.random.default_rng(0)
    return {
        "layers.0.weight": rng.normal(size=(4, 8)).astype(np.float32),
        "layers.0.bias": rng.normal(size=8).astype(np.float32),
        "layers.1.weight": rng.normal(size=(4, 8)).astype(np.float32),
        "größe": rng.normal(size=()).astype(np.float64),
        "phase": rng.normal(size=3).astype(np.complex64),
        "wide": rng.normal(size=3) + 1j,
        "empty": np.zeros((0, 3), np.float32),
    }


@pytest.fixture
def record():
    return Record(
        step=12,
        count=4,
        schedule=ema.HalfLife(steps=1000),
        update_after_step=2,
        update_every=3,
        not_averaged=("frozen.weight",),
        extra={"note": "ä second run"},
    )


@pytest.fixture
def same(arrays_of):
    """Whether a file holds these arrays, bit for bit."""

    def check(path, arrays):
        found = arrays_of(path)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape
            assert found[name].tobytes() == array.tobytes()

    return check


@pytest.fixture
def edit():
    """Change the header of a file and leave its data: ``edit(file, change)``."""

    def rewrite(file, change):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        text = change(header)
        if not isinstance(text, bytes):
            text = json.dumps(header if text is None else text, ensure_ascii=False).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return rewrite
