"""Calls from within what ``torch.compile`` has compiled: run as they are written."""

import sys

import pytest
import torch
from torch import nn

from ema.torch_backend import EMAModel
from tests import processes

SIDE = 80


@pytest.fixture
def compiled():
    """Compile a function as far as Dynamo goes; forget it afterwards."""
    torch.compiler.reset()
    yield lambda function: torch.compile(function, backend="eager")
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"compensated": True}, {"on_nonfinite": "skip"}],
    ids=str,
)
def test_a_compiled_train_step_updates(options, compiled):
    averages = []
    for wrap in (lambda function: function, compiled):
        torch.manual_seed(0)
        model = nn.Linear(SIDE, SIDE)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ema_model = EMAModel(model, 0.9, **options)

        def step(inputs, model=model, optimizer=optimizer, ema_model=ema_model):
            model(inputs).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema_model.update()

        step = wrap(step)
        for _ in range(6):
            step(torch.randn(2, SIDE))
        assert ema_model.count == 6
        averages.append(ema_model.averaged_parameters())
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


@pytest.mark.slow
@pytest.mark.parametrize("assign", [False, True])
def test_a_compiled_evaluation_swaps(assign, compiled):
    model = nn.Linear(SIDE, SIDE)
    ema_model = EMAModel(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    ema_model.update()

    def both(inputs):
        with torch.no_grad(), ema_model.use_ema(assign=assign):
            averaged = model(inputs)
        return averaged, model(inputs)

    inputs = torch.ones(1, SIDE)
    expected = both(inputs)
    for _ in range(2):
        assert all(map(torch.equal, compiled(both)(inputs), expected))
    assert not torch.equal(*expected)


def test_nothing_loads_dynamo_where_nothing_is_compiled():
    program = (
        "import sys, torch; from ema import EMAModel; "
        "e = EMAModel(torch.nn.Linear(2, 2)); e.update(); e.apply_ema(); e.restore_original(); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    processes.run([sys.executable, "-c", program])
