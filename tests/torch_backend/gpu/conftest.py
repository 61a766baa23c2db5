"""A simulated GPU."""

import weakref

import pytest
import torch

from ema.torch_backend.gpu import side_stream as side_stream_module
from tests.torch_backend.gpu.simulation import Event, Simulation


@pytest.fixture
def gpu(monkeypatch):
    simulation = Simulation()
    for known in ("_side_streams", "_silent", "_seen"):
        monkeypatch.setattr(side_stream_module, known, weakref.WeakSet())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: simulation.current[device])
    monkeypatch.setattr(torch.cuda, "Stream", simulation.stream)
    monkeypatch.setattr(torch.cuda, "stream", simulation.on)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: simulation.capturing)
    return simulation


@pytest.fixture(params=[False, True], ids=["first", "latest"])
def latest_first(request):
    """Which streams run ahead."""
    return request.param
