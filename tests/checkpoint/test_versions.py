"""The format stays readable: files of version 1, written once and kept, and what comes after them.

``fixtures/`` holds what the first version of the library wrote; it is never written anew.
"""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import ema
from ema import CheckpointError, EMAModel
from ema.checkpoint import Record, read_state, write_state
from ema.jax_backend import load_params_ema, params_ema

FIXTURES = Path(__file__).with_name("fixtures")
EXPECTED = {
    "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 8,
    "layer.bias": np.array([-1.5, 2.25], np.float32),
    "größe": np.array(0.1, np.float64),
    "phase": np.array([1 + 2j], np.complex64),
    "wide": np.array([3 - 4j, 0.1j], np.complex128),
}


@pytest.mark.parametrize("name", ["version1", "version1_split"])
def test_version_1_is_read(name, same):
    same(FIXTURES / name, EXPECTED)
    record = read_state(FIXTURES / name).record
    assert (record.step, record.count) == (1200, 300)
    assert record.schedule == ema.InverseGammaWarmup(decay=0.999, power=0.75)
    assert (record.update_after_step, record.update_every) == (0, 4)
    assert record.not_averaged == ("frozen",)
    assert record.extra == {"note": "first version"}


@pytest.mark.parametrize("name", ["version1", "version1_split"])
def test_version_1_goes_on_in_both_backends(name):
    model = nn.Module()
    model.layer = nn.Linear(3, 2)
    model.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    for key in ("größe", "phase", "wide"):
        model.register_parameter(key, nn.Parameter(torch.from_numpy(EXPECTED[key].copy())))
    schedule = ema.InverseGammaWarmup(decay=0.999, power=0.75)
    ema_model = EMAModel(model, schedule, update_every=4)
    ema_model.load(FIXTURES / name)
    for key, average in ema_model.averaged_parameters().items():
        np.testing.assert_array_equal(average.numpy(), EXPECTED[key])
    ema_model.update()
    assert ema_model.step == 1201

    rename = {"größe": None, "phase": None, "wide": None, "frozen": None}
    state = params_ema(0.9).init({"layer": {"weight": jnp.zeros((2, 3)), "bias": jnp.zeros(2)}})
    state = load_params_ema(FIXTURES / name, state, rename=rename)
    np.testing.assert_array_equal(state.params_ema["layer"]["weight"], EXPECTED["layer.weight"])
    assert (int(state.step), int(state.count)) == (1200, 300)


@pytest.fixture
def copied(tmp_path):
    shutil.copy(FIXTURES / "version1" / "ema.safetensors", tmp_path)
    return tmp_path / "ema.safetensors"


def test_a_newer_version_is_refused_by_its_number(copied, edit):
    """Even where it seals its header in a way that nobody knows yet."""

    def change(header):
        header["__metadata__"] = {"format": "ema", "format_version": "2", "seal": "?"}

    edit(copied, change)
    with pytest.raises(CheckpointError, match="format version 2, this library reads 1: update"):
        read_state(copied)


def test_metadata_that_others_add_is_kept(copied, edit, same):
    edit(copied, lambda header: header["__metadata__"].update(model="tiny", url="https://x.test"))
    same(copied, EXPECTED)
    assert read_state(copied).record.extra == {
        "note": "first version",
        "model": "tiny",
        "url": "https://x.test",
    }


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "Schedule", "__import__", "Mine"])
def test_a_schedule_of_another_class_is_a_description_and_nothing_is_made_of_it(
    tmp_path, arrays, sources_of, name
):
    """A file is read where the class of its schedule is unknown; no class is looked up by name."""
    described = {"schedule": name, "table": [0.5, {"rest": None}], "limit": "inf"}
    file = write_state(tmp_path, Record(step=2, count=1, schedule=described), sources_of(arrays))
    assert read_state(file).record.schedule == described


@pytest.mark.parametrize("text", ["[1]", "3", '"HalfLife"', '{"steps":1}', '{"schedule":[]}'])
def test_a_schedule_that_is_neither_null_nor_a_description_is_damage(copied, edit, text):
    edit(copied, lambda header: header["__metadata__"].update(schedule=text))
    with pytest.raises(
        CheckpointError, match="`schedule` does not describe a schedule: a schedule needs"
    ):
        read_state(copied)


def test_no_code_of_ours_can_run_what_a_file_says():
    """No pickle, no eval, no import by name in what reads files."""
    package = Path(ema.__file__).parent
    readers = [
        *(package / "checkpoint").glob("*.py"),
        *package.glob("*_backend/saving/files.py"),
        *(package / "converting").glob("*.py"),
        package / "schedules.py",
    ]
    assert len(readers) > 10
    for file in readers:
        text = file.read_text()
        for word in (
            "pickle.load",
            "eval(",
            "exec(",
            "import_module",
            "__import__",
            "allow_pickle",
        ):
            assert word not in text, (file, word)
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, call.keywords), file
