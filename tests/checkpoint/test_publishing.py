"""What a save publishes can be read again, and what it replaces is kept until then."""

import os
import stat
import threading

import numpy as np
import pytest

from ema.checkpoint import Record, Source, container, read_state, split, write_state
from ema.checkpoint.container import TensorInfo, build_header, parse_header
from ema.errors import CheckpointError


def source(array):
    return Source("F32", array.shape, array.tobytes)


def tensors(number, shape=(1, 1, 1, 1, 1)):
    return {f"layers.{i}.weight": source(np.full(shape, i, np.float32)) for i in range(number)}


def compensated(number):
    """Averages and remainders of five dimensions."""
    both = tensors(number)
    rest = {f"remainder of {name}": each for name, each in both.items()}
    parts = {key: ("", "remainder", key.removeprefix("remainder of ")) for key in rest}
    return {**both, **rest}, parts


RECORD = Record(step=3, count=2)


@pytest.mark.slow
def test_ten_thousand_compensated_parameters_of_five_dimensions(tmp_path):
    both, parts = compensated(10_000)
    record = Record(step=3, count=2, parts=parts)
    write_state(tmp_path, record, both)
    state = read_state(tmp_path)
    assert len(state.tensors) == 20_000
    assert state.record.parts == parts


@pytest.mark.slow
@pytest.mark.parametrize("number", [40_000, 140_000])
def test_many_tensors_are_split_and_read_again(tmp_path, number):
    write_state(tmp_path, RECORD, tensors(number, (2,)))
    state = read_state(tmp_path)
    assert len(state.tensors) == number
    assert bytes(state.tensors["layers.7.weight"].bytes()) == np.full(2, 7, np.float32).tobytes()


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "metadata",
    [{"notes": "x" * 3_000_000}, {"notes": "[" * 900_000}, {"notes": "{," * 400_000}],
    ids=["long", "brackets", "braces"],
)
def test_what_a_reader_would_refuse_replaces_nothing(tmp_path, metadata, shards, monkeypatch):
    """Metadata of the user's, with limits as small as that makes them."""
    monkeypatch.setattr(container, "MAX_HEADER", 1 << 20)
    monkeypatch.setattr(split, "MAX_INDEX", 1 << 20)
    monkeypatch.setattr(container, "_COST_AT_LEAST", 1 << 16)
    size = 50 * 10**9 if shards == 1 else 8
    write_state(tmp_path, RECORD, tensors(4), max_shard_size=size)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    asked = []
    many = {name: Source("F32", (1,), lambda: asked.append(1) or b"0000") for name in tensors(4)}
    with pytest.raises(CheckpointError, match=r"allowed|too large"):
        write_state(tmp_path, Record(step=4, count=4, extra=metadata), many, max_shard_size=size)
    assert not asked  # it is known before the first tensor is read
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert read_state(tmp_path).record == RECORD


@pytest.mark.parametrize("size", [50 * 10**9, 8])
def test_a_name_that_is_averaged_and_not_averaged_is_refused(tmp_path, size):
    record = Record(step=1, count=1, not_averaged=("layers.1.weight", "head"))
    with pytest.raises(
        CheckpointError, match=r"`not_averaged` names .* averages: `layers.1.weight`"
    ):
        write_state(tmp_path, record, tensors(3), max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [[0, 1 << 62, 4], [1 << 40, 0, 1 << 40]])
def test_a_shape_that_overflows_is_refused_though_it_holds_nothing(shape):
    text = build_header({"w": TensorInfo("F32", tuple(shape), 0, 0)}, {})
    with pytest.raises(CheckpointError, match="shape that overflows"):
        parse_header(text, len(text))


@pytest.mark.parametrize("size", [50 * 10**9, 8])
@pytest.mark.parametrize("folder", [False, True])
def test_a_link_leads_to_what_was_written_through_it(tmp_path, size, folder):
    """A split state lies beside the file that the link leads to."""
    real, link = tmp_path / "real" / "x.safetensors", tmp_path / "link.safetensors"
    real.parent.mkdir()
    if folder:
        link, real = tmp_path / "link", tmp_path / "real"
    link.symlink_to(real)
    write_state(link, RECORD, tensors(4), max_shard_size=size)
    assert len(read_state(link).tensors) == len(read_state(real).tensors) == 4
    assert link.is_symlink()


def test_an_index_beside_the_link_itself_decides(tmp_path):
    """As in the cache of a hub, where every file is a link to one of another name."""
    write_state(tmp_path / "blobs", RECORD, tensors(4), max_shard_size=8)
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert len(read_state(tmp_path).tensors) == 4


@pytest.mark.skipif(os.name != "posix", reason="permissions")
@pytest.mark.parametrize("size", [50 * 10**9, 8])
def test_the_permissions_of_the_old_file_are_kept(tmp_path, size):
    write_state(tmp_path, RECORD, tensors(3), max_shard_size=size)
    for file in tmp_path.iterdir():
        file.chmod(0o640)
    for other in (8, 50 * 10**9, size):
        write_state(tmp_path, RECORD, tensors(3), max_shard_size=other)
        assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}


def test_a_name_of_255_bytes_can_be_saved_again_and_again(tmp_path):
    file = tmp_path / ("x" * 243 + ".safetensors")
    assert len(file.name) == 255
    for step in range(1, 4):
        write_state(file, Record(step=step, count=1), tensors(2))
        assert read_state(file).record.step == step
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
@pytest.mark.parametrize("name", ["ema.safetensors", "ema.safetensors.index.json"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for call in (lambda: read_state(tmp_path), lambda: write_state(tmp_path, RECORD, tensors(1))):
        refused = []

        def try_it(call=call, refused=refused):
            try:
                call()
            except CheckpointError as error:
                refused.append(str(error))

        thread = threading.Thread(target=try_it, daemon=True)
        thread.start()
        thread.join(600)
        assert refused
        assert "not a regular file" in refused[0]


def test_digests_are_of_the_bytes_that_were_written(tmp_path):
    """Whatever another thread does to the tensor between the two."""
    array = np.zeros(3 << 20, np.float32)

    class Restless:
        """A buffer that changes each time it was looked at."""

        def __init__(self):
            self.stop = threading.Event()
            self.thread = threading.Thread(target=self.run)

        def run(self):
            while not self.stop.is_set():
                array[:] += 1.0

    restless = Restless()
    restless.thread.start()
    try:
        for _ in range(3):
            write_state(tmp_path, RECORD, {"w": Source("F32", array.shape, lambda: array.data)})
            read_state(tmp_path)
    finally:
        restless.stop.set()
        restless.thread.join()


def test_the_parents_of_a_new_folder_are_flushed(tmp_path, monkeypatch):
    from ema.checkpoint import atomic

    flushed = []
    real = atomic.flush_folder
    monkeypatch.setattr(
        atomic, "flush_folder", lambda folder: (flushed.append(folder), real(folder))
    )
    write_state(tmp_path / "a" / "b", RECORD, tensors(1))
    assert flushed[:2] == [tmp_path, tmp_path / "a"]
