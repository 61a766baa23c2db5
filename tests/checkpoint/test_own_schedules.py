"""Files whose schedule is of a user's own class: ``ema inspect``, ``convert``, and both backends."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import ema
from ema.checkpoint import Record, read_state, write_state
from ema.command.main import build_app
from ema.jax_backend import load_params_ema, params_ema, save_params_ema
from ema.torch_backend import EMAModel
from tests.own_schedules import ALL, DESCRIBED, UNDESCRIBED, Constant, Table


@dataclasses.dataclass(frozen=True)
class Noted(ema.Schedule):
    """Carries a text."""

    note: str

    def weight(self, count, span=1, xp=None):
        return 0.5


def inspected(path):
    result = CliRunner().invoke(build_app(), ["inspect", str(path)])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Schedule:")]
    return line.removeprefix("Schedule:").strip()


@pytest.mark.parametrize(
    ("schedule", "shown"),
    [
        (Table((0.5, 0.75)), "Table(decays=[0.5, 0.75])"),
        (DESCRIBED["our name"][0], "HalfLife(updates=1)"),
        (UNDESCRIBED["function"], "not known"),
        (ema.ExponentialRamp(decay=0.9, tau=20), "ExponentialRamp(decay=0.9, tau=20.0)"),
        (Noted("a\x1b[31m\nb"), r"Noted(note='a\x1b[31m\nb')"),
        (
            Noted("n" * 1000),
            "Noted(note='" + "n" * 138 + "…" + "n" * 148 + "') (1,014 characters)",
        ),
    ],
)
def test_inspect_shows_class_and_fields_on_one_line(tmp_path, schedule, shown):
    EMAModel(nn.Linear(1, 1), schedule).save(tmp_path)
    assert inspected(tmp_path) == shown


def test_a_name_in_a_file_cannot_steer_the_terminal(tmp_path, arrays, sources_of):
    record = Record(step=1, count=1, schedule={"schedule": "\x1b[31m", "\x1b]0;": "\n"})
    write_state(tmp_path, record, sources_of(arrays))
    assert inspected(tmp_path) == r"\x1b[31m(\x1b]0;='\n')"


@pytest.mark.parametrize("name", ALL)
def test_the_file_of_either_backend_is_read_by_the_other(tmp_path, name):
    """With the description that its schedule has, and without the class."""
    described = DESCRIBED[name][1] if name in DESCRIBED else None
    model = nn.Module()
    model.w = nn.Parameter(torch.arange(3.0))
    state = params_ema(0.5).init({"w": jnp.zeros(3)})
    file = EMAModel(model, ALL[name]).save(tmp_path / "torch")
    loaded = load_params_ema(file, state)
    np.testing.assert_array_equal(loaded.params_ema["w"], np.arange(3.0))
    file = save_params_ema(
        tmp_path / "jax", loaded, decay=ALL[name], update_after_step=0, update_every=1
    )
    assert read_state(file).record.schedule == described
    average = EMAModel(model, ALL[name])
    average.load(file)
    assert torch.equal(average.averaged_parameters()["w"], torch.arange(3.0))


@pytest.mark.parametrize("name", ALL)
def test_our_own_state_dict_is_converted_with_its_description(tmp_path, name):
    described = DESCRIBED[name][1] if name in DESCRIBED else None
    average = EMAModel(nn.Linear(1, 1), {"a": ALL[name], "b": 0.5})
    torch.save(average.state_dict(), tmp_path / "ema.pt")
    for source in (tmp_path / "ema.pt", average.state_dict()):
        converted = ema.convert(source, tmp_path / "ours", name="a", force=True)
        assert converted.record.schedule == described
        assert read_state(converted.place).record.schedule == described
        again = ema.convert(source, tmp_path / "ours", name="b", force=True)
        assert again.record.schedule == ema.ConstantDecay(decay=0.5)


def test_a_schedule_of_the_users_own_can_be_told_to_convert(tmp_path):
    average = EMAModel(nn.Linear(1, 1), 0.5)
    for mine in (Constant(decay=0.5), UNDESCRIBED["array"]):
        state = average.state_dict()
        place = ema.convert(state, tmp_path / "ours", decay=mine, force=True).place
        described = None if mine is UNDESCRIBED["array"] else mine.to_dict()
        assert read_state(place).record.schedule == described
