"""The file: what is written comes back, whatever is there before and whoever reads it."""

from __future__ import annotations

import json
import os
import stat

import numpy as np
import pytest
import safetensors.numpy

import ema
from ema import ArgumentError, ArgumentTypeError, CheckpointError
from ema.checkpoint import Record, Source, read_state, write_state, write_tensors


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_a_state_comes_back_as_it_was(tmp_path, arrays, record, same, sources_of):
    file = write_state(tmp_path, record, sources_of(arrays))
    assert file == tmp_path / "ema.safetensors"
    assert names(tmp_path) == ["ema.safetensors"]
    same(tmp_path, arrays)
    same(file, arrays)
    assert read_state(file).record == record


def test_a_plain_reader_sees_averages_under_their_names(tmp_path, arrays, record, sources_of):
    file = write_state(tmp_path, record, sources_of(arrays))
    del arrays["phase"], arrays["wide"]  # complex numbers, of which NumPy's reader knows nothing
    with safetensors.safe_open(file, "np") as plain:
        assert {*arrays, "phase", "wide"} == set(plain.keys())
        for name, array in arrays.items():
            np.testing.assert_array_equal(plain.get_tensor(name), array)
        assert plain.metadata()["step"] == "12"
        assert plain.metadata()["kind"] == "ema"
        assert plain.metadata()["library_version"] == ema.__version__
        assert json.loads(plain.metadata()["schedule"]) == {"schedule": "HalfLife", "steps": 1000.0}


def test_equal_states_give_equal_files_in_any_order(tmp_path, arrays, record, sources_of):
    first = write_state(tmp_path / "a", record, sources_of(arrays))
    turned = dict(reversed(arrays.items()))
    second = write_state(tmp_path / "b", record, sources_of(turned))
    assert first.read_bytes() == second.read_bytes()


def test_every_tensor_is_aligned(tmp_path, record, sources_of):
    arrays = {"a": np.ones(1, np.float32), "b": np.ones(1), "c": np.ones(3, np.float32)}
    state = read_state(write_state(tmp_path, record, sources_of(arrays)))
    for tensor in state.tensors.values():
        start = tensor.file.header.start + tensor.info.begin
        assert start % np.dtype(f"f{tensor.nbytes // tensor.shape[0]}").itemsize == 0


@pytest.mark.parametrize("name", ["new/folder", "state.safetensors", "new/state.safetensors"])
def test_a_name_with_the_suffix_is_a_file_and_any_other_a_folder(
    tmp_path, arrays, record, name, sources_of
):
    file = write_state(tmp_path / name, record, sources_of(arrays))
    expected = tmp_path / name
    assert file == (expected if expected.suffix else expected / "ema.safetensors")
    assert read_state(expected).place == file


def test_a_file_that_is_no_state_of_that_name_is_not_overwritten(
    tmp_path, arrays, record, sources_of
):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt: it is a file"):
        write_state(tmp_path / "notes.txt", record, sources_of(arrays))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_link_still_leads_to_the_file(tmp_path, arrays, record, same, sources_of):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "ema.safetensors"
    link.symlink_to(tmp_path / "disk" / "state.safetensors")
    write_state(link, record, sources_of(arrays))
    assert link.is_symlink()
    same(link, arrays)


@pytest.mark.parametrize("behind_a_link", [False, True])
def test_what_is_no_file_is_not_replaced_by_one(
    tmp_path, arrays, record, sources_of, behind_a_link
):
    """Root would turn ``/dev/null`` into a file by that."""
    path = place = tmp_path / "pipe.safetensors"
    os.mkfifo(place)
    if behind_a_link:
        path = tmp_path / "link.safetensors"
        path.symlink_to(place)
    for write in (
        lambda: write_state(path, record, sources_of(arrays)),
        lambda: write_tensors(path, sources_of({"bias": np.zeros(2, np.float32)}), {}),
    ):
        with pytest.raises(
            CheckpointError, match="it is not a regular file: writing would replace it by one"
        ):
            write()
    assert place.is_fifo()
    assert len(list(tmp_path.iterdir())) == 1 + behind_a_link


def test_the_file_has_the_rights_of_any_new_file(tmp_path, arrays, record, sources_of):
    (tmp_path / "other").touch()
    file = write_state(tmp_path, record, sources_of(arrays))
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize("limit", [0, "1GB", float("nan")])
def test_a_size_that_is_none_is_refused(tmp_path, arrays, record, limit, sources_of):
    with pytest.raises((ArgumentError, ArgumentTypeError), match="`max_shard_size` must be"):
        write_state(tmp_path, record, sources_of(arrays), max_shard_size=limit)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError, OSError(28, "No space")])
@pytest.mark.parametrize("limit", [10**9, 100])
def test_a_save_that_fails_leaves_the_old_state_and_nothing_else(
    tmp_path, arrays, record, same, interrupt, limit, sources_of
):
    write_state(tmp_path, record, sources_of(arrays), max_shard_size=limit)
    before = names(tmp_path)

    def fail():
        raise interrupt

    sources = {**sources_of(arrays), "layers.1.weight": Source("F32", (4, 8), fail)}
    with pytest.raises(CheckpointError if isinstance(interrupt, OSError) else interrupt):
        write_state(tmp_path, record, sources, max_shard_size=limit)
    assert names(tmp_path) == before
    same(tmp_path, arrays)


def test_what_killed_saves_have_left_is_removed_and_other_files_are_not(
    tmp_path, arrays, record, sources_of
):
    left = [
        ".ema.safetensors.0123456789abcdef.tmp",
        ".ema.safetensors.index.json.0123456789abcdef.tmp",
        "ema-0123456789abcdef-00001-of-00002.safetensors",
    ]
    others = [
        "model.safetensors",
        ".model.safetensors.0123456789abcdef.tmp",
        "ema-short.safetensors",
        "ema-short-0123456789abcdef-00001-of-00002.safetensors",
    ]
    for name in (*left, *others):
        (tmp_path / name).write_text("x")
    write_state(tmp_path, record, sources_of(arrays))
    assert names(tmp_path) == sorted([*others, "ema.safetensors"])


def test_what_another_process_is_writing_is_not_removed(tmp_path, arrays, record, sources_of):
    from ema.checkpoint import atomic

    file = tmp_path / ".ema.safetensors.0123456789abcdef.tmp"
    with atomic.create(file):
        write_state(tmp_path, record, sources_of(arrays))
        assert file.exists()
    write_state(tmp_path, record, sources_of(arrays))
    assert not file.exists()


def test_a_failure_to_write_names_the_file_and_the_reason(arrays, record, sources_of):
    with pytest.raises(CheckpointError, match=r"/proc/none/x: cannot be written: .*/proc/none"):
        write_state("/proc/none/x", record, sources_of(arrays))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": -1}, "`step` must be an integer in"),
        ({"step": 1.0}, "`step` must be an integer in"),
        ({"step": 2**63}, "`step` must be an integer in"),
        ({"count": 13}, r"`count` must not exceed `step` \(12\), got 13"),
        ({"update_every": 0}, "`update_every` must be an integer in"),
        ({"extra": {"step": "1"}}, "metadata must not be called 'step'"),
        ({"extra": {"a": 1}}, "metadata must be strings"),
    ],
)
def test_a_record_that_cannot_be_is_refused(fields, message):
    with pytest.raises(CheckpointError, match=message):
        Record(**{"step": 12, "count": 4, **fields})


def test_very_many_tensors_go_into_several_files(tmp_path, record, arrays_of):
    sources = {
        f"layers.{i}.weight": Source("F32", (1,), np.float32(i).tobytes) for i in range(45_000)
    }
    write_state(tmp_path, record, sources)
    assert len(names(tmp_path)) == 1 + 3
    found = arrays_of(tmp_path)
    assert all(found[f"layers.{i}.weight"] == i for i in range(45_000))


def test_a_state_may_become_split_and_whole_again(tmp_path, arrays, record, sources_of, same):
    """Old files go, and what is read is the latest state, whichever form it has."""
    forms = []
    for step, limit in enumerate([10**9, 130, 130, 250, 10**9, 130]):
        arrays["layers.0.bias"][:] = step
        write_state(tmp_path, record, sources_of(arrays), max_shard_size=limit)
        same(tmp_path, arrays)
        same(tmp_path / "ema.safetensors", arrays)
        assert read_state(tmp_path).record == record
        forms.append(names(tmp_path))
    assert forms[0] == forms[4] == ["ema.safetensors"]
    assert len(forms[1]) == len(forms[2]) > len(forms[3]) > 2
    assert not set(forms[1][:-1]) & set(forms[2][:-1])  # each save has names of its own


def test_the_index_is_one_that_other_tools_read(tmp_path, arrays, record, sources_of):
    write_state(tmp_path, record, sources_of(arrays), max_shard_size=130)
    index = json.loads((tmp_path / "ema.safetensors.index.json").read_text())
    assert index["metadata"]["step"] == "12"
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / file, "np") as plain:
            assert name in plain.keys()  # noqa: SIM118 — it is no mapping


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "model.safetensors"])
def test_an_index_leads_to_no_file_that_is_not_its_own(tmp_path, arrays, record, sources_of, name):
    write_state(tmp_path, record, sources_of(arrays), max_shard_size=130)
    index = tmp_path / "ema.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"] = dict.fromkeys(fields["weight_map"], name)
    index.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=f"the index names '{name}', which cannot be a file"):
        read_state(tmp_path)
