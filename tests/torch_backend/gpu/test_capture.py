"""An update within a CUDA graph: what a graph cannot hold is refused, and nothing has moved."""

import pytest
import torch
from torch import nn

import ema
from ema import EMAModel
from ema.errors import EMAWarning, StateError
from ema.torch_backend import averages
from ema.torch_backend.gpu import kernels, offload
from ema.torch_backend.update import guard, prepared
from tests.torch_backend.gpu.runs import differences, make, train


@pytest.fixture
def capture(monkeypatch):
    """Captures from now on; the CPU passes for a GPU."""

    def begin(ema_model):
        bound = ema_model._averages._bound
        if bound is not None:
            bound.update.on_cuda = True
        for module in (averages, prepared):
            monkeypatch.setattr(module, "capturing", lambda: True)

    def end():
        for module in (averages, prepared):
            monkeypatch.setattr(module, "capturing", lambda: False)

    begin.end = end
    return begin


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": ema.DebiasedDecay(decay=0.9)}, "each replay would repeat its decay"),
        ({"dtype": torch.bfloat16}, "random bits"),
        ({"on_nonfinite": "raise"}, "on_nonfinite='raise'"),
        ({"on_nonfinite": "skip"}, "on_nonfinite='skip'"),  # no kernels here
    ],
    ids=str,
)
def test_what_a_graph_cannot_hold_is_refused(options, words, capture):
    model = make()
    one = EMAModel(model, **{"decay": 0.9, **options})
    train((model,), (one,), 1)
    before = one.state_dict()
    capture(one)
    with pytest.raises(StateError, match=f"CUDA graph cannot hold.*{words}"):
        one.update()
    capture.end()
    assert differences(before, one.state_dict()) == []
    assert (one.step, one.count) == (1, 1)
    one.update()
    assert (one.step, one.count) == (2, 2)


def test_the_update_that_starts_an_average_is_refused(capture):
    model = make()
    one = EMAModel(model, 0.9, update_after_step=2)
    capture(one)
    with pytest.raises(StateError, match=r"CUDA graph cannot hold.*not started"):
        one.update()
    assert one.step == 0


def test_an_update_after_the_model_has_changed_is_refused(capture):
    model = nn.ParameterList(make())
    one = EMAModel(model, 0.9)
    one.update()
    capture(one)
    model[1].data = model[1].data.clone()
    with pytest.raises(StateError, match=r"CUDA graph cannot hold.*has changed"):
        one.update()
    assert one.step == 1


def test_an_average_on_the_host_is_refused(capture, monkeypatch):
    monkeypatch.setattr(prepared, "_is_offloaded", lambda entry: True)
    model = make()
    one = EMAModel(model, 0.9)
    one.update()
    capture(one)
    with pytest.raises(StateError, match=r"CUDA graph cannot hold.*host"):
        one.update()
    assert one.step == 1


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("arrived", [True, False])
def test_a_guarded_update_is_captured_without_a_flag(capture, arrived, monkeypatch):
    """No flag is made, and one that is pending is not asked for while the graph is captured."""
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(guard.DeviceFlag, "has_arrived", lambda self: arrived)
    model = make()
    one = EMAModel(model, 0.9, on_nonfinite="skip")
    for step in range(3):
        train((model,), (one,), step)
    pending = one._counters.pending
    assert pending
    capture(one)
    asked = []
    monkeypatch.setattr(guard.DeviceFlag, "has_arrived", asked.append)
    monkeypatch.setattr(guard.DeviceFlag, "__init__", lambda *_: asked.append("made"))
    one.update()
    assert not asked
    assert one._counters.pending == pending
    capture.end()
    assert (one.step, one.count, one.skipped) == (4, 4, 0)


class Elsewhere:
    """A tensor of an accelerator that no machine here has."""

    def __init__(self, device):
        self.device = torch.device(device)


def test_overlap_without_streams_is_said_once():
    with pytest.warns(EMAWarning, match="needs streams of CUDA or ROCm: on `mps`, `xpu`"):
        assert prepared.warn_without_streams([Elsewhere("mps"), Elsewhere("xpu"), torch.ones(1)])
    assert not prepared.warn_without_streams([torch.ones(1), Elsewhere("cuda")])


def test_hosts_wait_asleep(gpu, monkeypatch):
    """An event that spins would keep a core from those who compute the average."""
    run = offload.SideStream([torch.device("cuda", 0)])
    run.run(lambda: None)
    assert [done.blocking for done in run._done.values()] == [True]
