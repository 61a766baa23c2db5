"""Resources of the tests of the PyTorch backend."""

import importlib

import numpy as np
import pytest
import torch

from tests.torch_helpers import Small


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def model() -> Small:
    return Small()


def _fused(_, x, y, z):
    """A multiply-add that rounds once; the interpreter's own rounds twice.

    The product is exact in float64. The sum is rounded to odd there, so that rounding it again, to
    float32, is as good as rounding the exact one (Boldo and Melquiond 2008).
    """
    from triton.runtime.interpreter import TensorHandle

    product, addend = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = total.view(np.int64) % 2 == 0
    total = np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total)
    return TensorHandle(total.astype(np.float32), z.dtype.scalar)


@pytest.fixture
def interpreted(monkeypatch):
    """Import the kernels so that they run here; nothing else is interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    importlib.import_module("ema.torch_backend.gpu.device_code")
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    monkeypatch.setattr(builder, "create_fma", _fused)
    with np.errstate(all="ignore"):  # Inf − Inf is among what is tested
        yield
