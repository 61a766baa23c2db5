"""Models and runs that the tests of the PyTorch backend share."""

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Small(nn.Module):
    """Two linear layers around a BatchNorm: parameters, float buffers and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 2)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


@pytest.fixture
def model() -> Small:
    return Small()


@pytest.fixture
def another() -> Callable[[], Small]:
    """Make further models of the same class."""
    return Small


def perturb(model: nn.Module, scale: float = 1.0) -> None:
    """A step of training, as far as an average can tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter) * scale)


@pytest.fixture
def step() -> Callable[..., None]:
    return perturb


@pytest.fixture
def values() -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    """Copies of all parameters of a model."""
    return lambda model: {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Two mappings of tensors are equal bit for bit."""

    def check(ours, theirs):
        assert ours.keys() == theirs.keys()
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert different == []

    return check


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
