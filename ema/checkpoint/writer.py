"""Write a state: stream the tensors, seal the header, rename."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

from ema import validate
from ema.checkpoint import atomic
from ema.checkpoint.container import (
    DTYPE_BITS,
    Header,
    TensorInfo,
    bits_of,
    build_header,
    parse_header,
)
from ema.checkpoint.contents import check_contents
from ema.checkpoint.digests import seal
from ema.checkpoint.paths import (
    errors_of,
    exists,
    file_to_write,
    index_of,
    new_token,
    place_to_write,
    shard_name,
    temporary_of,
    token_of,
    unfinished,
)
from ema.checkpoint.record import Record, record_to, to_json
from ema.checkpoint.split import Index, index_from, index_text, read_index, split
from ema.errors import CheckpointError, shortened, shown

__all__ = ["MAX_SHARD_SIZE", "Source", "write_state", "write_tensors"]

MAX_SHARD_SIZE = 50 * 10**9
"""Most bytes of tensors in one file. A larger state is split over several files."""

_CHUNK = 8 << 20  # small enough to stay in the cache from the digest to the write


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor to be written.

    Attributes:
        dtype: its dtype in the names of safetensors (``"F32"``, ``"BF16"``), or ``"C128"``.
        shape: its shape.
        read: returns its elements as contiguous bytes, little-endian and in row-major order. The writer
            calls it once, just before it writes this tensor, so that one tensor at a time is in memory.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Any]


def write_state(
    path: str | os.PathLike[str],
    record: Record,
    tensors: Mapping[str, Source],
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Path:
    """Write a state atomically: if the process is killed, the previous state survives.

    Args:
        path: a file that ends in ``.safetensors``; or a folder, which is created, for
            ``ema.safetensors`` in it.
        record: the facts about the average.
        tensors: the tensors, by their names in the file. Their order does not matter: equal states give
            equal files.
        max_shard_size: most bytes of tensors in one file. A larger state is split.

    Returns:
        The file; for a split state, the file name to which its index belongs.

    Raises:
        ArgumentError: ``max_shard_size`` is not positive.
        ArgumentTypeError: ``max_shard_size`` is not a number.
        CheckpointError: the state cannot be written. The message names the file and the reason.
    """
    validate.positive("max_shard_size", max_shard_size)
    with errors_of(path, "written"):
        _check_sources(tensors, {*DTYPE_BITS, "C128"})
    stored = {**tensors}
    metadata = record_to(record)
    metadata["dtype"] = ", ".join(sorted({source.dtype for source in tensors.values()}))
    pairs = [name for name, source in tensors.items() if source.dtype == "C128"]
    for name in pairs:  # safetensors lacks complex128: store pairs of reals
        source = tensors[name]
        stored[name] = Source("F64", (*source.shape, 2), source.read)
    if pairs:
        metadata["complex128"] = to_json(sorted(pairs))
    with errors_of(path, "written"):
        place = place_to_write(path)
        old = _clean(place)
        groups = split({name: _size(stored[name]) for name in _order(stored)}, max_shard_size)
        if len(groups) > 1:
            _write_split(place, metadata, stored, groups)
            place.unlink(missing_ok=True)  # the new index is already in force
        else:
            _write_whole(
                place,
                stored,
                lambda infos, digests: seal(metadata, infos, digests),
                lambda header: check_contents(header.metadata, header.tensors),
            )
            if exists(index_of(place)):  # the old state is in force until its index is gone
                index_of(place).unlink(missing_ok=True)
        atomic.flush_folder(place.parent)
        for name in [] if old is None else old.files:
            atomic.remove(place.with_name(name))
    return place


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Source], metadata: Mapping[str, str]
) -> Path:
    """Write a plain safetensors file atomically.

    Raises:
        CheckpointError: the file cannot be written. The message names the file and the reason.
    """
    with errors_of(path, "written"):
        _check_sources(tensors, DTYPE_BITS)
        place = file_to_write(path)
        _clean(place)
        _write_whole(place, tensors, lambda _infos, _digests: dict(metadata), _nothing)
    return place


def _check_sources(tensors: Mapping[str, Source], dtypes: Collection[str]) -> None:
    for name, source in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"names of tensors must be strings, got {shown(name)}")
        if source.dtype not in dtypes:
            raise CheckpointError(f"`{shortened(name)}` is {source.dtype}, which safetensors lacks")
        sizes = source.shape
        if not isinstance(sizes, tuple) or not all(
            type(n) is int and 0 <= n < 1 << 63 for n in sizes
        ):
            raise CheckpointError(f"`{shortened(name)}` has no valid shape: {shown(sizes)}")


def _write_whole(
    place: Path, tensors: Mapping[str, Source], metadata: _Metadata, check: _Check
) -> None:
    temporary = temporary_of(place, new_token())
    try:
        with atomic.create(temporary) as stream:
            atomic.keep_mode(stream, place if place.exists() else index_of(place))
            _stream(stream, tensors, metadata, check)
            atomic.rename(stream, temporary, place)
    except BaseException:
        atomic.remove(temporary)
        raise


def _write_split(
    place: Path,
    metadata: Mapping[str, str],
    tensors: Mapping[str, Source],
    groups: list[list[str]],
) -> None:
    token = new_token()
    shards = [shard_name(place, token, number, len(groups)) for number in range(1, len(groups) + 1)]
    infos: dict[str, TensorInfo] = {}
    digests: dict[str, str] = {}
    file_of: dict[str, str] = {}
    index = temporary_of(index_of(place), token)
    old = index_of(place) if exists(index_of(place)) else place

    def sealed(digests: Mapping[str, str] | None) -> bytes:
        """The text of the index, after the checks of a reader."""
        text = index_text(seal(metadata, infos, digests), file_of)
        check_contents(index_from(place, text).metadata, infos)
        return text

    for file, names in zip(shards, groups, strict=True):
        infos |= _infos({name: tensors[name] for name in names})
        file_of |= dict.fromkeys(names, file)
    sealed(None)  # refuse before anything is written
    try:
        # while the index is locked, other saves do not delete the files with its token
        with atomic.create(index) as stream:
            for file, names in zip(shards, groups, strict=True):
                with atomic.create(place.with_name(file)) as shard:
                    atomic.keep_mode(shard, old)
                    part = {name: tensors[name] for name in names}
                    digests |= _stream(shard, part, lambda _infos, _digests: {}, _nothing)
                    atomic.flush(shard)
            atomic.flush_folder(place.parent)
            atomic.keep_mode(stream, old)
            _write(stream, sealed(digests))
            atomic.rename(stream, index, index_of(place))
    except BaseException:
        atomic.remove(index)
        current = read_index(place, lenient=True)
        if current is None or shards[0] not in current.files:  # otherwise the new state is in force
            for file in shards:
                atomic.remove(place.with_name(file))
        raise


_Metadata = Callable[[Mapping[str, TensorInfo], Mapping[str, str] | None], dict[str, str]]
_Check = Callable[[Header], object]
"""A reader's checks of a header. Raises what the reader would raise."""


def _nothing(_: Header) -> None:
    """Check nothing: the file holds no metadata of `ema`."""


def _infos(tensors: Mapping[str, Source]) -> dict[str, TensorInfo]:
    """The position of each tensor in a file that holds these tensors."""
    infos: dict[str, TensorInfo] = {}
    position = 0
    for name in _order(tensors):
        source = tensors[name]
        end = position + _size(source)
        infos[name] = TensorInfo(source.dtype, tuple(source.shape), position, end)
        position = end
    return infos


def _stream(
    stream: IO[bytes], tensors: Mapping[str, Source], metadata: _Metadata, check: _Check
) -> dict[str, str]:
    """Write the tensors and compute their digests, then write the header that contains the digests.

    The header passes the reader's checks twice: without digests before the first tensor is written, and
    with them before the file is published.

    Returns:
        The digest of each tensor.
    """
    infos = _infos(tensors)
    size = sum(info.end - info.begin for info in infos.values())
    room = build_header(infos, metadata(infos, None))
    check(parse_header(room, len(room) + size))
    _write(stream, room)
    digests = {name: _copy(name, tensors[name], stream) for name in infos}
    header = build_header(infos, metadata(infos, digests))
    if len(header) != len(room):
        raise CheckpointError("the header changed length while the tensors were written")
    if header != room:  # equal if it holds no digests, as in a file of a split state
        check(parse_header(header, len(header) + size))
        stream.seek(0)
        _write(stream, header)
    return digests


def _copy(name: str, source: Source, stream: IO[bytes]) -> str:
    read = source.read()
    try:
        data = memoryview(read)
        data = data.cast("B") if data.nbytes else memoryview(b"")  # an empty buffer cannot be cast
    except TypeError as error:  # not a buffer, or not contiguous
        raise CheckpointError(f"`{shortened(name)}` must be contiguous bytes: {error}") from None
    if len(data) != _size(source):
        raise CheckpointError(f"`{shortened(name)}` takes {_size(source)} bytes, got {len(data)}")
    state = xxhash.xxh3_128()
    own = bytearray(
        min(len(data), _CHUNK)
    )  # a copy, since another thread may change the tensor meanwhile
    for start in range(0, len(data), _CHUNK):
        chunk = data[start : start + _CHUNK]
        own[: len(chunk)] = chunk
        copied = memoryview(own)[: len(chunk)]
        state.update(copied)
        _write(stream, copied)
        copied.release()
    return state.hexdigest()


def _write(stream: IO[bytes], data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def _order(tensors: Mapping[str, Source]) -> list[str]:
    """Sort names by dtype, the widest first, so that every tensor is aligned; then by name."""
    return sorted(tensors, key=lambda name: (-DTYPE_BITS[tensors[name].dtype], name))


def _size(source: Source) -> int:
    return bits_of(source.dtype, source.shape) // 8


def _clean(place: Path) -> Index | None:
    """Remove what killed saves have left. If the index cannot be read, keep all files of split states.

    Returns:
        The index that is in force, if there is one and it can be read.
    """
    temporaries, shards = unfinished(place)
    busy = {token_of(file) for file in temporaries if not atomic.remove_unlocked(file)}
    old = read_index(place, lenient=True)  # read last: a running save may just have published it
    if old is None and exists(index_of(place)):
        return None
    named = set() if old is None else set(old.files)
    for file in shards:
        if file.name not in named and token_of(file) not in busy:
            atomic.remove_unlocked(file)
    return old
