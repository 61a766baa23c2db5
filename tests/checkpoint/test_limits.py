"""What a state cannot be, in memory or in a file, is one ``CheckpointError``; and how large it can be."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from ema import ArgumentError, ArgumentTypeError, CheckpointError, EMAModel
from ema.checkpoint import Record, Source, container, read_state, split, write_state
from ema.checkpoint.container import MAX_HEADER
from ema.checkpoint.description import describe_file
from ema.checkpoint.remainders import joined
from ema.jax_backend import params_ema, save_params_ema
from tests import processes

RECORD = Record(step=3, count=2)
LARGE = [10**400, 10**5000, -(10**5000), 2**63]
"""Python writes out no integer of more than 4300 digits, and a file holds counts below 2**63."""


def kind(value):
    """The name of a case: pytest writes large integers out."""
    return value if isinstance(value, str) else type(value).__name__


def source(shape=(1,)):
    return Source("F32", shape, np.zeros(shape, np.float32).tobytes)


def tensors(number, shape=(1,)):
    return {f"layers.{i}.weight": source(shape) for i in range(number)}


# --- numbers and types ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [*LARGE, "3", 2.0, True, float("nan"), np.int64(3)], ids=kind)
@pytest.mark.parametrize("name", ["step", "count", "update_after_step", "update_every", "skipped"])
def test_a_record_holds_numbers_that_a_file_can_hold(name, value):
    fields = {"step": 12, "count": 4, name: value}
    with pytest.raises(CheckpointError, match=f"`{name}` must be an integer in ") as error:
        Record(**fields)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"not_averaged": (1,)}, "`not_averaged` must be a tuple of names, got (1,)"),
        ({"not_averaged": None}, "`not_averaged` must be a tuple of names, got None"),
        ({"not_averaged": "abc"}, "`not_averaged` must be a tuple of names, got 'abc'"),
        ({"parts": [1]}, "`parts` must be a mapping, got [1]"),
        ({"parts": {"w": 3}}, "`parts` of 'w' must be three strings"),
        ({"parts": {1: ("", "remainder", "w")}}, "`parts` of 1 must be three strings"),
        ({"extra": ["note"]}, "metadata must be a mapping, got ['note']"),
        ({"extra": {"a": 10**5000}}, "metadata must be strings, got 'a': an integer of 16610 bits"),
        ({"extra": {"a": [10**5000]}}, "metadata must be strings, got 'a': a list with an integer"),
        ({"library_version": 3}, "`library_version` must be a string, got 3"),
    ],
    ids=kind,
)
def test_a_record_holds_what_it_says(fields, message):
    with pytest.raises(CheckpointError) as error:
        Record(step=12, count=4, **fields)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "metadata", [["note"], "note", 3, {"a": 1}, {1: "a"}, {"a": 10**5000}], ids=kind
)
def test_metadata_of_a_wrong_type_is_refused_in_both_backends(tmp_path, metadata):
    ema_model = EMAModel(nn.Linear(2, 2), 0.9)
    state = params_ema(0.9).init({"w": jnp.ones(2)})
    for save in (
        lambda: ema_model.save(tmp_path / "a", metadata=metadata),
        lambda: save_params_ema(tmp_path / "a", state, metadata=metadata),
    ):
        with pytest.raises(CheckpointError, match="metadata must be"):
            save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({1: source()}, "names of tensors must be strings, got 1"),
        ({"w": Source("F33", (1,), bytes)}, "`w` is F33, which safetensors lacks"),
        ({"w": Source(None, (1,), bytes)}, "`w` is None, which safetensors lacks"),
        ({"w": Source("F32", (2.0,), bytes)}, r"`w` has no valid shape: \(2\.0,\)"),
        ({"w": Source("F32", [2], bytes)}, r"`w` has no valid shape: \[2\]"),
        ({"w": Source("F32", (-1,), bytes)}, r"`w` has no valid shape: \(-1,\)"),
        ({"w": Source("F32", (10**5000,), bytes)}, "`w` has no valid shape"),
        ({"w": Source("F32", (2**61, 0, 2**61), bytes)}, "`w` has a shape that overflows"),
        ({"w": Source("F32", (1,), lambda: "text")}, "`w` must be contiguous bytes"),
        (
            {"w": Source("F32", (1,), lambda: memoryview(b"01234567")[::2])},
            "`w` must be contiguous",
        ),
        ({"w": Source("F32", (1,), bytes)}, "`w` takes 4 bytes, got 0"),
    ],
    ids=kind,
)
def test_tensors_that_cannot_be_are_refused_and_nothing_is_replaced(tmp_path, wrong, message):
    file = write_state(tmp_path, RECORD, tensors(2))
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=message):
        write_state(tmp_path, RECORD, wrong)
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_parts_are_those_of_tensors_that_are_there(tmp_path):
    record = Record(step=1, count=1, parts={"remainder/x": ("", "remainder", "x")})
    with pytest.raises(
        CheckpointError, match="`parts` names tensors that the file lacks: `remaind"
    ):
        write_state(tmp_path, record, tensors(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("step", "count", "update_after_step") for value in LARGE),
        ("update_every", 10**5000),
        ("format_version", 10**5000),
        ("format_version", torch.ones(2)),
        ("format_version", True),
        ("schedule", 10**5000),
        ("averages", [10**5000]),
        ("averages", {"weight": 10**5000}),
        ("averages", {1: torch.ones(2)}),
        ("not_averaged", 10**5000),
        ("not_averaged", [1]),
        ("not_averaged", ["weight"]),
    ],
    ids=kind,
)
def test_a_state_dict_that_cannot_be_is_refused(key, value):
    ema_model = EMAModel(nn.Linear(2, 2), 0.9)
    before = ema_model.state_dict()
    with pytest.raises(CheckpointError) as error:
        ema_model.load_state_dict({**before, key: value})
    assert len(str(error.value)) < 300
    after = ema_model.state_dict()
    assert (after["step"], after["count"]) == (before["step"], before["count"])


@pytest.mark.parametrize("name", ["update_after_step", "update_every"])
def test_what_a_file_cannot_hold_is_refused_from_the_start(name):
    with pytest.raises(ArgumentError, match=rf"`{name}` must be below 2\*\*63, got"):
        EMAModel(nn.Linear(2, 2), 0.9, **{name: 2**63})
    with pytest.raises(ArgumentError, match=rf"`{name}` must be below 2\*\*\d\d, "):
        params_ema(0.9, **{name: 10**5000})
    with pytest.raises(ArgumentError, match=rf"`{name}` must be at least "):
        EMAModel(nn.Linear(2, 2), 0.9, **{name: -(10**5000)})


@pytest.mark.parametrize("path", [b"/tmp/x", 3, None])
def test_what_is_no_path_is_refused(path):
    for call in (lambda: write_state(path, RECORD, tensors(1)), lambda: read_state(path)):
        with pytest.raises(ArgumentTypeError, match="`path` must be a string or a path, got"):
            call()


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".safetensors", "a\0b"])
def test_a_path_that_cannot_be_is_refused_by_its_name(tmp_path, name):
    path = f"{tmp_path}/{name}"
    for call in (lambda: write_state(path, RECORD, tensors(1)), lambda: read_state(path)):
        with pytest.raises(CheckpointError, match=r"[/a-z0-9_]+"):
            call()


# --- how large a state can be --------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_thousand_compensated_parameters_of_five_dimensions(tmp_path):
    """A mixture of experts; each file's header is one that safetensors itself takes."""
    experts = {
        f"model.layers.{i // 300}.mlp.experts.{i % 300}.weight": source((1, 1, 1, 1, 1))
        for i in range(200_000)
    }
    both, parts = joined(experts, experts)
    write_state(tmp_path, Record(step=3, count=2, parts=parts), both)
    for file in tmp_path.glob("*.safetensors"):
        assert int.from_bytes(file.read_bytes()[:8], "little") < MAX_HEADER
    state = read_state(tmp_path)
    assert len(state.tensors) == 400_000
    assert state.record.parts == parts


def test_long_names_are_split_over_files_whose_headers_are_under_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "MAX_NAMES", 20_000)
    monkeypatch.setattr(container, "MAX_HEADER", 60_000)
    names = {f"{i:02d}" + "ü" * 1000: source() for i in range(40)}
    write_state(tmp_path, RECORD, names)
    assert len(list(tmp_path.iterdir())) == 1 + 5
    assert read_state(tmp_path).tensors.keys() == names.keys()


@pytest.mark.parametrize("size", [50 * 10**9, 4])
def test_what_is_too_large_is_refused_with_the_limit_and_what_helps(tmp_path, size, monkeypatch):
    file = write_state(tmp_path, RECORD, tensors(3))
    before = file.read_bytes()
    monkeypatch.setattr(container, "MAX_HEADER", 1 << 16)
    monkeypatch.setattr(split, "MAX_INDEX", 1 << 16)
    record = Record(step=3, count=2, extra={"note": "x" * (1 << 16)})
    message = r"(header|index) takes 6\d{4} bytes, 65536 are allowed: shorten `metadata`, or the na"
    with pytest.raises(CheckpointError, match=message):
        write_state(tmp_path, record, tensors(3), max_shard_size=size)
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_too_many_files_are_refused_before_any_is_written(tmp_path, monkeypatch):
    """Their numbers have five digits, so a reader would not know the others."""
    monkeypatch.setattr(split, "MAX_FILES", 4)
    with pytest.raises(CheckpointError, match="5 files, 4 are allowed: raise `max_shard_size`"):
        write_state(tmp_path, RECORD, tensors(5), max_shard_size=4)
    assert list(tmp_path.iterdir()) == []
    assert split.MAX_FILES < 10**5


# --- files that are open -------------------------------------------------------------------------

FEW = """
import resource, sys
import numpy as np, torch
from torch import nn
from ema import EMAModel
from ema.checkpoint import Record, Source, read_state, write_state
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
arrays = {f"w{i:04d}": np.full(2, i, np.float32) for i in range(1000)}
sources = {name: Source("F32", (2,), array.tobytes) for name, array in arrays.items()}
for step in (1, 2):
    write_state(sys.argv[1], Record(step=step, count=1), sources, max_shard_size=8)
state = read_state(sys.argv[1])
assert len(state.files) == 1000
for _ in range(2):
    for name, array in arrays.items():
        assert bytes(state.tensors[name].bytes()) == array.tobytes()
first = state.tensors["w0000"].bytes()
model = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in arrays})
average = EMAModel(model, 0.9)
average.load(sys.argv[1])
average.save(sys.argv[1], max_shard_size=8)
average.load(sys.argv[1])
assert all((average.averaged_parameters()[n].numpy() == a).all() for n, a in arrays.items())
assert bytes(first) == arrays["w0000"].tobytes()
try:
    state.tensors["w0500"].bytes()
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
def test_a_thousand_files_need_few_descriptors(tmp_path):
    """To save, to read, to load; a tensor that is held stays, also when its file is gone."""
    result = processes.run([sys.executable, "-c", FEW, tmp_path])
    assert result.stdout.startswith("CheckpointError ema-")
    assert "is gone: another save has replaced the state" in result.stdout


def test_a_split_save_beside_another_keeps_its_files(tmp_path):
    """The other process holds one lock for all of them."""
    seen = []

    def meanwhile():
        before = {file.name for file in tmp_path.iterdir()}
        write_state(tmp_path, Record(step=9, count=1), tensors(1))
        seen.append(before - {file.name for file in tmp_path.iterdir()})
        return bytes(4)

    several = {**tensors(3), "zz": Source("F32", (1,), meanwhile)}
    write_state(tmp_path, RECORD, several, max_shard_size=4)
    assert seen == [set()]
    assert read_state(tmp_path).tensors.keys() == several.keys()


def test_a_pipe_that_comes_into_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    """Between the look and the opening."""
    file = write_state(tmp_path, RECORD, tensors(1))
    regular = file.stat()
    file.unlink()
    os.mkfifo(file)
    real = Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda self, **kwargs: regular if self == file else real(self, **kwargs)
    )
    refused = []

    def read():
        try:
            read_state(file)
        except CheckpointError as error:
            refused.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(600)
    assert refused == [f"{file}: it is not a regular file"]


# --- what is printed -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [50 * 10**9, 4])
def test_inspect_prints_a_screen_for_a_name_of_a_million_characters(tmp_path, size):
    long = "ab" + "x" * 1_000_000 + "yz"
    record = Record(
        step=1,
        count=1,
        schedule={"schedule": "Mine", "table": [0.5] * 10_000},
        extra={"note": "n" * 1_000_000, "k" * 1_000_000: "v", **{f"{i}": "" for i in range(300)}},
    )
    write_state(tmp_path, record, {**tensors(30), long: source()}, max_shard_size=size)
    text = str(describe_file(tmp_path))
    assert len(text) < 20_000
    assert max(map(len, text.splitlines())) < 600
    (line,) = [line for line in text.splitlines() if line.startswith("  abxx")]
    assert "xxyz (1,000,004 characters)" in line
    assert "More notes:" in text


@pytest.mark.parametrize("what", ["digests", "index", "load", "dtype", "both"])
def test_a_refusal_is_a_line_also_for_long_names(tmp_path, what):
    long = [f"{i}" + "x" * 100_000 for i in range(12)]
    several = {name: source() for name in long}
    ema_model = EMAModel(nn.Linear(2, 2), 0.9)
    if what == "both":
        with pytest.raises(CheckpointError) as error:
            write_state(tmp_path, Record(step=1, count=1, not_averaged=tuple(long)), several)
    elif what == "dtype":
        write_state(tmp_path, RECORD, {n: Source("I32", (1,), lambda: bytes(4)) for n in long})
        with pytest.raises(CheckpointError, match="cannot be averages") as error:
            ema_model.load(tmp_path)
    elif what == "index":
        write_state(tmp_path, RECORD, several, max_shard_size=4)
        index = tmp_path / "ema.safetensors.index.json"
        fields = json.loads(index.read_text())
        file = next(iter(fields["weight_map"].values()))
        fields["weight_map"] |= {name + "y": file for name in long}
        index.write_text(json.dumps(fields))
        with pytest.raises(CheckpointError) as error:
            read_state(tmp_path)
    else:
        file = write_state(tmp_path, RECORD, several)
        data = bytearray(file.read_bytes())
        if what == "digests":
            data[-8:] = b"\1" * 8
            file.write_bytes(data)
        with pytest.raises(CheckpointError) as error:
            ema_model.load(tmp_path)
    assert len(str(error.value)) < 10_000
