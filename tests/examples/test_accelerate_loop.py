"""The Accelerate example runs, resumes and exports; its average is the one of the recursion."""

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from ema import EMAModel
from tests import processes

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"


def run(*arguments):
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    return processes.run(command).stdout.strip()


@pytest.mark.slow
def test_interrupted_and_resumed_is_the_same(tmp_path):
    """The same bits in the export; the average is closer to the truth than the live weights."""
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", "--stop-after", 2)
    resumed = run(tmp_path / "parts", "--resume")
    assert whole == resumed
    assert whole.startswith("64 updates; live ")
    live, averaged = (float(part.split()[-1]) for part in whole.split(";")[1].split(","))
    assert averaged < live
    one, two = (
        safetensors.torch.load_file(tmp_path / name / "averaged.safetensors")
        for name in ("whole", "parts")
    )
    assert one.keys() == two.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def _new_accelerate():
    """Accelerate keeps its settings for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_new_accelerate")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_prepared_model_with_gradient_accumulation(tmp_path, mixed_precision):
    """Only real steps count; save_state and load_state bring the average back."""
    torch.manual_seed(0)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=3, mixed_precision=mixed_precision
    )
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    ema_model = EMAModel(model, 0.7)
    accelerator.register_for_checkpointing(ema_model)
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(9):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(5, 4)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema_model.update()
            for name, parameter in model.named_parameters():
                expected[name].lerp_(parameter.detach(), 1 - 0.7)
    assert ema_model.count == 3
    accelerator.save_state(str(tmp_path / "state"))
    live = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ema_model.reset()
    accelerator.load_state(str(tmp_path / "state"))
    averages = ema_model.averaged_parameters()
    assert ema_model.count == 3
    for name, parameter in model.named_parameters():
        assert torch.equal(averages[name], expected[name])
        assert torch.equal(parameter, live[name])
