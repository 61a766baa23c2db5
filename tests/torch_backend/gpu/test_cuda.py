"""Averages on a GPU have the bits of averages on the CPU, with every option.

Runs where there is a GPU. ``EMA_DEVICE=cpu`` runs the same on the CPU, which tests the tests.
"""

import copy
import os

import pytest
import torch

import ema
from ema import EMAModel
from ema.errors import StateError
from ema.torch_backend.gpu import kernels
from ema.torch_backend.update.guard import all_finite
from tests.torch_backend.gpu.runs import differences, make, train

DEVICE = os.environ.get("EMA_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"
)

OPTIONS = [
    {},
    {"decay": 0.3},
    {"compensated": True, "decay": 0.99999},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16, "decay": 0.9999},
    {"dtype": torch.bfloat16, "stochastic_rounding": False},
    {"on_nonfinite": "skip"},
    {"on_nonfinite": "skip", "compensated": True},
    {"on_nonfinite": "skip", "dtype": torch.bfloat16, "decay": ema.DebiasedDecay(decay=0.9)},
    {"on_nonfinite": "raise"},
    {"update_after_step": 2, "update_every": 2},
    {"decay": {"short": 0.5, "long": 0.99}, "on_nonfinite": "skip", "update_every": 2},
    {"decay": {"short": 0.5, "long": 0.99}, "compensated": True},
]
WHERE = [{}, {"overlap": True}, {"device": "cpu"}]
LIVE = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=["Triton", "PyTorch"])
def way(request, monkeypatch):
    """With kernels, and with PyTorch's operators in their place."""
    if request.param == "PyTorch":
        monkeypatch.setattr(kernels, "available", lambda device: False)
    elif DEVICE == "cuda":
        assert kernels.available(torch.device("cuda", 0))
    return request.param


def step_both(host, card, optimizer, host_average, card_average, step):
    """The same weights on both sides, and an update of both averages; what the two raise."""
    train((host,), (), step)
    optimizer.step()  # tells overlap that weights are about to be written
    with torch.no_grad():
        for there, here in zip(card, host, strict=True):
            there.copy_(here)
    raised = []
    for average in (host_average, card_average):
        try:
            average.update()
        except StateError as error:
            raised.append(str(error))
    return raised


@pytest.mark.parametrize("where", WHERE, ids=str)
@pytest.mark.parametrize("live", LIVE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("way")
def test_the_bits_are_those_of_the_cpu(options, live, where):
    """Step 5 holds a NaN: propagated, skipped or refused on both sides alike."""
    host, card = make(live), make(live).to(DEVICE)
    here = EMAModel(host, **{"decay": 0.9, **options})
    there = EMAModel(card, **{"decay": 0.9, **options, **where})
    optimizer = torch.optim.SGD(card.parameters(), lr=0.0)
    for parameter in card:
        parameter.grad = torch.zeros_like(parameter)
    for step in range(1, 9):
        raised = step_both(host, card, optimizer, here, there, step)
        assert len(set(raised)) == len(raised) / 2
    assert differences(here.state_dict(), there.state_dict()) == []
    assert (here.step, here.count, here.skipped) == (there.step, there.count, there.skipped)


@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
@pytest.mark.usefixtures("way")
def test_states_swaps_and_copies_have_the_bits_of_the_cpu(options):
    host, card = make(), make().to(DEVICE)
    here = EMAModel(host, **{"decay": 0.9, **options})
    there = EMAModel(card, **{"decay": 0.9, **options})
    optimizer = torch.optim.SGD(card.parameters(), lr=0.0)
    for step in range(1, 4):
        step_both(host, card, optimizer, here, there, step)
    live = {name: p.detach().clone() for name, p in card.named_parameters()}
    with here.use_ema(), there.use_ema():
        assert differences(dict(host.named_parameters()), dict(card.named_parameters())) == []
    assert differences(live, dict(card.named_parameters())) == []
    again, other = copy.deepcopy(card), make().to(DEVICE)
    there.copy_to(other)
    here.copy_to(host)
    assert differences(dict(host.named_parameters()), dict(other.named_parameters())) == []
    restored = EMAModel(again, **{"decay": 0.9, **options})
    restored.load_state_dict(here.state_dict())
    assert differences(here.state_dict(), restored.state_dict()) == []


@pytest.mark.skipif(DEVICE != "cuda", reason="takes 12 GiB")
def test_more_than_2_31_elements():
    size = 2**31 + 4096
    params, average = (
        torch.ones(size, dtype=torch.bfloat16, device=DEVICE),
        torch.zeros(size, device=DEVICE),
    )
    kernels.Fused([average], [params])(0.25)
    for part in (average[:4096], average[2**31 - 2048 : 2**31 + 2048], average[-4096:]):
        assert bool((part == 0.25).all())
    params[-1] = float("nan")
    assert not kernels.Look([params])()
    assert not all_finite([params])
