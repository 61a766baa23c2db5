"""``ema inspect`` and ``ema convert``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch_ema import ExponentialMovingAverage
from typer.testing import CliRunner

from ema.checkpoint import read_state, write_state
from ema.command.main import build_app


def run(*arguments):
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


@pytest.mark.parametrize("limit", [10**9, 130])
def test_inspect_tells_what_a_file_is(tmp_path, arrays, record, sources_of, limit):
    write_state(tmp_path, record, sources_of(arrays), max_shard_size=limit)
    result = run("inspect", tmp_path)
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "Step: 12" in lines
    assert "Updates: 4" in lines
    assert "Schedule: HalfLife(steps=1000.0)" in lines
    assert "Not averaged: 1 parameters" in lines
    assert "Digests: all right" in lines
    assert "note: ä second run" in lines
    assert "layers.0.weight F32 (4, 8) 128 B" in lines
    assert "wide C128 (3,) 48 B" in lines


def test_inspect_tells_which_tensor_is_damaged(tmp_path, arrays, record, sources_of):
    file = write_state(tmp_path, record, sources_of(arrays))
    tensor = read_state(file).tensors["layers.1.weight"]
    data = bytearray(file.read_bytes())
    data[tensor.file.header.start + tensor.info.begin + 5] ^= 1
    file.write_bytes(data)
    result = run("inspect", file)
    assert result.exit_code == 1
    assert "1 DAMAGED" in result.output
    (line,) = [line for line in result.output.splitlines() if line.endswith("  DAMAGED")]
    assert line.split()[0] == "layers.1.weight"


def test_inspect_refuses_in_one_line(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"12345")
    result = run("inspect", tmp_path / "x.safetensors")
    assert result.exit_code == 2
    assert result.output.strip().endswith(
        "x.safetensors: a file of 5 bytes is too short for a safetensors file"
    )


def test_convert_writes_our_file(tmp_path):
    model = torch.nn.Linear(2, 3)
    average = ExponentialMovingAverage(model.parameters(), 0.9, use_num_updates=False)
    torch.save(average.state_dict(), tmp_path / "ema.pt")
    (tmp_path / "names.txt").write_text("weight\nbias\n")
    result = run("convert", tmp_path / "ema.pt", tmp_path / "ours")
    assert result.exit_code == 2
    assert "`names` must be given" in result.output
    arguments = (
        "convert",
        tmp_path / "ema.pt",
        tmp_path / "ours",
        "--names",
        tmp_path / "names.txt",
    )
    result = run(*arguments)
    assert result.exit_code == 0
    assert "does not say how many steps" in result.output
    told = ("--step", "7", "--schedule", "HalfLife(steps=9)")
    result = run(*arguments, *told)
    assert result.exit_code == 2
    assert "there is a file already: force=True (--force) replaces it" in result.output
    result = run(*arguments, *told, "--force")
    assert result.exit_code == 0
    assert "does not tell" not in result.output
    assert "2 averages of torch-ema" in result.output
    record = read_state(tmp_path / "ours").record
    assert (record.step, record.schedule.steps) == (7, 9.0)
    result = run("convert", tmp_path / "ema.pt", tmp_path / "ours", "--names", tmp_path / "none")
    assert result.exit_code == 2
    assert "none: cannot be read" in result.output


def test_inspect_tells_of_skipped_updates_and_of_the_seed(tmp_path, arrays, record, sources_of):
    told = dataclasses.replace(record, skipped=3, seed=7)
    write_state(tmp_path, told, sources_of(arrays))
    lines = [" ".join(line.split()) for line in run("inspect", tmp_path).output.splitlines()]
    assert {"Skipped updates: 3", "Seed: 7"} <= set(lines)


def test_inspect_writes_out_what_would_steer_a_terminal(tmp_path, arrays, record, sources_of):
    notes = {"note\nDigests:": "all right\x1b[2J\u202e"}
    named = {f"{name}\x1b[31m": array for name, array in arrays.items()}
    write_state(tmp_path, dataclasses.replace(record, extra=notes), sources_of(named))
    printed = run("inspect", tmp_path).output
    assert all(c.isprintable() or c == "\n" for c in printed)
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert r"note\nDigests:: all right\x1b[2J\u202e" in lines
    assert r"layers.0.weight\x1b[31m" in printed


def test_convert_takes_a_name_a_line(tmp_path):
    averages = {"shadow_params": [torch.zeros(2), torch.ones(3)], "num_updates": 1, "decay": 0.9}
    torch.save(averages, tmp_path / "ema.pt")
    arguments = ("convert", tmp_path / "ema.pt", tmp_path / "ours", "--names")
    (tmp_path / "names.txt").write_text("a b.weight\r\n\n  ä.bias\n", "utf-8")
    assert run(*arguments, tmp_path / "names.txt").exit_code == 0
    assert list(read_state(tmp_path / "ours").tensors) == ["a b.weight", "ä.bias"]
    (tmp_path / "names.txt").write_bytes("ä.bias".encode("latin-1"))
    result = run(*arguments, tmp_path / "names.txt")
    assert result.exit_code == 2
    assert result.output.endswith("names.txt: it must be text in UTF-8: byte 0 is not\n")
