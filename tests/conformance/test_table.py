"""Each row of the table of schedules works wherever a schedule is taken."""

import jax.numpy as jnp
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import ema
from ema.checkpoint import read_state
from ema.command.main import build_app
from ema.schedules import EXAMPLES, schedule_from_dict

each = pytest.mark.parametrize("schedule", EXAMPLES, ids=lambda each: type(each).__name__)


@each
def test_the_package_exports_its_class(schedule):
    name = type(schedule).__name__
    assert getattr(ema, name) is type(schedule)
    assert name in ema.__all__


@each
def test_its_class_documents_the_decay(schedule):
    assert "decay" in type(schedule).__doc__


@each
def test_states_and_files_of_both_backends_hold_it(schedule, tmp_path):
    average = ema.EMAModel(nn.Linear(2, 1), schedule)
    average.update()
    described = average.state_dict()["schedule"]
    assert schedule_from_dict(described) == schedule
    assert read_state(average.save(tmp_path / "torch")).record.schedule == schedule
    state = ema.params_ema(schedule).init({"w": jnp.ones(2)})
    written = ema.save_params_ema(tmp_path / "jax", state, decay=schedule)
    assert read_state(written).record.schedule == schedule


@each
def test_a_state_with_it_is_loaded_without_a_warning(schedule):
    average = ema.EMAModel(nn.Linear(2, 1), schedule)
    average.update()
    other = ema.EMAModel(nn.Linear(2, 1), schedule)
    other.load_state_dict(average.state_dict())
    assert torch.equal(
        other.averaged_parameters()["weight"], average.averaged_parameters()["weight"]
    )


@each
def test_the_command_describes_it(schedule):
    result = CliRunner().invoke(
        build_app(), ["info", "--schedule", str(schedule), "--steps", "100"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{ema.describe_ema(schedule, 100)}\n"
