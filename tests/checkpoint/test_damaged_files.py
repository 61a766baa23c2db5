"""Ten thousand damaged files: each is refused in one sentence, and nothing is assigned."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import time
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from ema import CheckpointError, EMAModel
from ema.checkpoint import read_state, write_state
from ema.checkpoint.container import TensorInfo
from ema.checkpoint.description import describe_file
from ema.checkpoint.digests import digest, seal
from ema.checkpoint.remainders import joined
from ema.converting.convert import convert

NUMBERS = [-1, 0, 1, 2, 7, 2**31, 2**53, 2**63, 2**64 - 1, 10**400, 0.5, 1e308, True]
VALUES: list[object] = [*NUMBERS, None, "", "F32", "\ud800", [], {}, [[]], "[" * 3000, "x" * 100]


def put(file, data):
    """A new file; ext4 waits for the disk where one is written over."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def pack(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def bit_flip(data, rng):
    position = rng.randrange(8 * len(data))
    flipped = bytearray(data)
    flipped[position // 8] ^= 1 << position % 8
    return bytes(flipped)


def truncation(data, rng):
    return data[: rng.randrange(len(data))]


def addition(data, rng):
    return data + rng.randbytes(rng.randint(1, 64))


def overwriting(data, rng):
    start = rng.randrange(len(data) - 32)
    return data[:start] + rng.randbytes(32) + data[start + 32 :]


def insertion(data, rng):
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.randint(1, 16)) + data[start:]


def deletion(data, rng):
    start = rng.randrange(len(data) - 16)
    return data[:start] + data[start + rng.randint(1, 16) :]


def length(data, rng):
    told = rng.choice([0, 1, 2, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, rng.randrange(len(data))])
    return told.to_bytes(8, "little") + data[8:]


def swapped_tensors(data, rng):
    """Two tensors change their places, in the header or in the data."""
    header, tensors = header_of(data)
    names = [n for n in header if n != "__metadata__" and header[n]["shape"] == [4, 8]]
    first, second = (header[name]["data_offsets"] for name in rng.sample(names, 2))
    if rng.random() < 0.5:
        first[:], second[:] = second[:], first[:]
        return pack(header, tensors)
    a, b = (tensors[slice(*offsets)] for offsets in (first, second))
    swapped = bytearray(tensors)
    swapped[slice(*first)], swapped[slice(*second)] = b, a
    return pack(header, bytes(swapped))


def wrong_shape(data, rng):
    """Another shape or dtype of as many bytes."""
    header, tensors = header_of(data)
    name = rng.choice([n for n in header if n != "__metadata__" and header[n]["shape"] == [4, 8]])
    header[name] |= rng.choice(
        [{"shape": [8, 4]}, {"shape": [32]}, {"shape": [4, 8, 1]}, {"dtype": "I32"}]
    )
    return pack(header, tensors)


def any_value(data, rng):
    """One value of the header is replaced or removed, or a key is renamed, anywhere."""
    header, tensors = header_of(data)
    before = copy.deepcopy(header)
    while header == before:
        node = header
        while True:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            kind = rng.random()
            if kind < 0.7:
                node[key] = rng.choice(VALUES)
            elif kind < 0.85 or isinstance(node, list):
                del node[key]
            else:
                node[rng.choice(["", "x", "step", "__metadata__", "é"])] = node.pop(key)
            break
    return pack(header, tensors)


def any_metadata(data, rng):
    """The JSON in a string of the metadata is replaced."""
    header, tensors = header_of(data)
    key = rng.choice(list(header["__metadata__"]))
    text = rng.choice(["", "{", "[1", "nul", "NaN", "-1", "1e3", "[" * 5000, '{"a":1,"a":1}', "٣"])
    header["__metadata__"][key] = text
    return pack(header, tensors)


def duplicate(data, rng):
    header, tensors = header_of(data)
    text = json.dumps(header)
    key = rng.choice([*header, *header["__metadata__"], "dtype", "shape"])
    text = text.replace(json.dumps(key) + ":", f"{json.dumps(key)}: [], {json.dumps(key)}:", 1)
    return pack(text.encode(), tensors)


def nesting(data, rng):
    depth = rng.choice([100, 1_000, 10_000, 100_000])
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}")])
    inner = "1" if opened != "[" else ""
    text = '{"__metadata__":' + opened * depth + inner + closed * depth + "}"
    return pack(text.encode(), header_of(data)[1])


def encoding(data, rng):
    header, tensors = header_of(data)
    text = json.dumps(header)
    return pack(text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"])), tensors)


MUTATIONS = {
    bit_flip: 4000,
    truncation: 900,
    addition: 300,
    overwriting: 500,
    insertion: 500,
    deletion: 500,
    length: 400,
    swapped_tensors: 300,
    wrong_shape: 300,
    any_value: 1500,
    any_metadata: 400,
    duplicate: 300,
    nesting: 50,
    encoding: 50,
}


@pytest.fixture
def intact(tmp_path, arrays, record, sources_of):
    return write_state(tmp_path / "intact", record, sources_of(arrays)).read_bytes()


def test_ten_thousand_damaged_files_are_refused(tmp_path, intact):
    """With the file and the reason."""
    assert sum(MUTATIONS.values()) == 10_000
    rng = random.Random(0)
    file = tmp_path / "ema.safetensors"
    for mutate, times in MUTATIONS.items():
        for _ in range(times):
            damaged = mutate(intact, rng)
            if damaged == intact:  # a length or a byte that was right by chance
                continue
            put(file, damaged)
            with pytest.raises(CheckpointError) as error:
                read_state(file)
            assert type(error.value) is CheckpointError
            assert str(error.value).startswith(f"{file}: ")
            assert len(str(error.value)) < len(str(file)) + 1000
            error.value.__str__().encode(errors="backslashreplace")


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_damaged_file_assigns_nothing(tmp_path, mutate, compensated):
    """Also one that holds remainders, and the parts that say whose they are."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})
    ema_model = EMAModel(model, 0.9, compensated=compensated)

    def step():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        ema_model.update()

    step()  # remainders of 0 could change places unnoticed, and rightly so
    intact = ema_model.save(tmp_path).read_bytes()
    step()
    before = ema_model.state_dict()
    rng = random.Random(1)
    for _ in range(30):
        damaged = mutate(intact, rng)
        if damaged == intact:
            continue
        put(tmp_path / "ema.safetensors", damaged)
        with pytest.raises(CheckpointError):
            ema_model.load(tmp_path)
        after = ema_model.state_dict()
        assert (after["step"], after["count"]) == (2, 2)
        for kind in ("averages", "remainders") if compensated else ("averages",):
            for name, tensor in before[kind].items():
                assert torch.equal(after[kind][name], tensor)


def other_number(data, rng):
    header, tensors = header_of(data)
    key = rng.choice(["step", "count", "skipped", "seed", "update_after_step", "update_every"])
    header["__metadata__"][key] = rng.choice(
        ["0", "1", "3", "-1", "007", "1" * 400, str(2**63), "2.0", "null", "true", "", "x"]
    )
    return pack(header, tensors)


def other_list(data, rng):
    header, tensors = header_of(data)
    names = [name for name in header if name != "__metadata__"]
    chosen = rng.sample(names, 2)
    texts = [
        chosen,
        [*chosen, 3],
        ["other"],
        chosen[:1] * 2,
        {},
        {names[0]: ["", "remainder", "x"]},
    ]
    texts += [{names[0]: ["", "remainder", names[1]]}, {"x": ["", "remainder", names[1]]}, [None]]
    key = rng.choice(["not_averaged", "complex128", "parts"])
    header["__metadata__"][key] = json.dumps(rng.choice(texts))
    return pack(header, tensors)


def other_schedule(data, rng):
    header, tensors = header_of(data)
    fields = {"schedule": rng.choice(["HalfLife", "ConstantDecay", "Mine", "", 3, None])}
    fields |= {"steps": rng.choice(VALUES)} if rng.random() < 0.5 else {"decay": rng.choice(VALUES)}
    header["__metadata__"]["schedule"] = json.dumps(rng.choice([fields, [fields], None]))
    return pack(header, tensors)


def other_bytes(data, rng):
    header, tensors = header_of(data)
    return pack(header, overwriting(tensors, rng))


def resealed(data):
    """The same file with the digests of what is in it now, where those can be computed."""
    header, tensors = header_of(data)
    try:
        metadata = header["__metadata__"]
        named = {name: field for name, field in header.items() if name != "__metadata__"}
        entries = {
            name: TensorInfo(field["dtype"], tuple(field["shape"]), *field["data_offsets"])
            for name, field in named.items()
        }
        digests = {
            name: digest(tensors[slice(*field["data_offsets"])]) for name, field in named.items()
        }
        unsealed = {k: t for k, t in metadata.items() if k not in ("digests", "header_digest")}
        header["__metadata__"] = seal(unsealed, entries, digests)
        return pack(header, tensors)
    except (AttributeError, KeyError, TypeError, ValueError):
        return data


def what_is_read(file):
    """The record and the bytes of each tensor, or the message with which the file is refused."""
    try:
        state = read_state(file)
        str(describe_file(file))
        return state.record, {name: bytes(each.bytes()) for name, each in state.tensors.items()}
    except CheckpointError as error:
        return str(error)


FORGERIES = {
    other_number: 140,
    other_list: 130,
    other_schedule: 60,
    other_bytes: 20,
    any_value: 80,
    any_metadata: 40,
    wrong_shape: 20,
    swapped_tensors: 10,
}


@pytest.mark.parametrize("compensated", [False, True])
def test_a_file_with_digests_of_its_own_is_refused_or_read_as_it_is(
    tmp_path, intact, record, arrays, sources_of, compensated
):
    """250 of each kind; a program that changes a file can compute its digests too."""
    if compensated:
        both, parts = joined(sources_of(arrays), sources_of(arrays))
        record = dataclasses.replace(record, parts=parts)
        intact = write_state(tmp_path / "parts", record, both).read_bytes()
    assert header_of(resealed(intact)) == header_of(intact)
    rng, read, refused = random.Random(3), 0, 0
    file = tmp_path / "ema.safetensors"
    for mutate, times in FORGERIES.items():
        for _ in range(times // 2):
            data = resealed(mutate(intact, rng))
            put(file, data)
            tracemalloc.start()
            found = what_is_read(file)
            assert tracemalloc.get_traced_memory()[1] < 1.5 * len(data) + (64 << 20)
            tracemalloc.stop()
            if isinstance(found, str):
                assert found.startswith(f"{file}: ")
                assert len(found) < len(str(file)) + 1000
                refused += 1
                continue
            told, tensors = found
            header, body = header_of(data)
            metadata = header.pop("__metadata__")
            for name, field in header.items():
                assert tensors.pop(name) == body[slice(*field["data_offsets"])]
            assert tensors == {}
            for name in ("step", "count", "skipped", "seed", "update_after_step", "update_every"):
                text = metadata.get(name, "null")
                assert getattr(told, name) == (None if text == "null" else int(text))
            assert list(told.not_averaged) == json.loads(metadata["not_averaged"])
            parts = {key: list(part) for key, part in told.parts.items()}
            assert parts == json.loads(metadata.get("parts", "{}"))
            read += 1
    assert read > 30
    assert refused > 100


def test_every_flipped_bit_of_a_small_file_is_found(tmp_path, record, sources_of):
    data = write_state(tmp_path, record, sources_of({"w": np.ones(2, np.float32)})).read_bytes()
    file = tmp_path / "ema.safetensors"
    missed = []
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        put(file, flipped)
        try:
            read_state(file)
        except CheckpointError:
            continue
        missed.append(position)
    assert missed == []


def test_split_states_are_refused_if_any_of_their_files_is_damaged(
    tmp_path, arrays, record, sources_of
):
    write_state(tmp_path, record, sources_of(arrays), max_shard_size=130)
    rng = random.Random(0)
    files = list(tmp_path.iterdir())
    assert len(files) > 3
    for file in files:
        intact = file.read_bytes()
        for mutate in (bit_flip, truncation, overwriting, insertion, deletion):
            for _ in range(30):
                damaged = mutate(intact, rng)
                if damaged == intact:
                    continue
                put(file, damaged)
                with pytest.raises(CheckpointError, match=rf"^{tmp_path}/ema\.safetensors: "):
                    read_state(tmp_path)
        file.unlink()
        with pytest.raises(CheckpointError, match=r"No such file|cannot be read"):
            read_state(tmp_path)
        file.write_bytes(intact)
    read_state(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + b"[" * (20 << 20) + b"}",
        b'{"a":[' + b"1," * (10 << 20) + b"1]}",
        b'{"a":[' + b"[]," * (7 << 20) + b"1]}",
        b'{"a":[' + b"1.5," * (5 << 20) + b"1]}",
        b'{"a":' + b"1" * (20 << 20) + b"}",
        b'{"' + b"a" * (20 << 20) + b'":1}',
        b'{"a":"' + b"\\u0061" * (3 << 20) + b'"}',
        b"{" + b",".join(b'"%d":{}' % i for i in range(1 << 20)) + b"}",
        b"{" + b",".join(b'"%d":1' % i for i in range(260_000)) + b',"7":1}',
        b'{"a":"' + "𝛽".encode() * (4 << 20) + b'"}',
        b" " * (20 << 20),
        b"{" + b" " * (20 << 20),
    ],
    ids=lambda header: header[:10].decode() + f"…{len(header) >> 20} MiB",
)
def test_a_hostile_header_costs_little_time_and_memory(tmp_path, header):
    """No more than a few times its own size, which is really on the disk."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    begin = time.process_time()
    with pytest.raises(CheckpointError):
        read_state(file)
    assert time.process_time() - begin < 60  # a part of a second; if it were quadratic, hours
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_state(file)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(header) + (64 << 20)
    finally:
        tracemalloc.stop()


def test_a_small_file_that_tells_of_a_large_one_costs_nothing(tmp_path, intact, edit):
    file = tmp_path / "x.safetensors"
    changes = [
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"w": {"dtype": "F32", "shape": [2**62] * 64, "data_offsets": [0, 2**62]}},
        {"w": {"dtype": "U8", "shape": [0, 2**62], "data_offsets": [2**62, 2**62]}},
    ]
    for change in changes:
        file.write_bytes(intact)
        edit(file, lambda header, change=change: {**header, **change})
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            read_state(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    for length in (2**63, 2**40, 2**31):
        file.write_bytes(length.to_bytes(8, "little") + intact[8:])
        with pytest.raises(CheckpointError, match="a header of"):
            read_state(file)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", "/dev/zero", "/dev/null"):
        with pytest.raises(CheckpointError, match="it is not a regular file"):
            read_state(path)
    for path in (tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(CheckpointError, match=r"cannot be read|can have this name"):
            read_state(path)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((0, 8), (12, 20), "`b` must begin at byte 8 of the data, got 12"),
        ((0, 8), (4, 12), "`b` must begin at byte 8 of the data, got 4"),
        ((0, 8), (0, 8), "`b` must begin at byte 8 of the data, got 0"),
        ((4, 12), (12, 20), "`a` must begin at byte 0 of the data, got 4"),
        ((0, 8), (8, 16), "the tensors take 16 bytes, the file has room for 20"),
    ],
)
def test_tensors_fill_the_data_without_gap_or_overlap(tmp_path, first, second, message):
    """Also in files of others, which have no digests."""
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": list(offsets)}
        for name, offsets in (("a", first), ("b", second))
    }
    file = tmp_path / "x.safetensors"
    file.write_bytes(pack(header, bytes(20)))
    with pytest.raises(CheckpointError, match=message):
        convert(file, tmp_path / "ours", step=1)
