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
"""Bytes of tensors beyond which a state is split over several files."""

_CHUNK = 8 << 20  # digested and written while it is in the cache


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor to be written.

    Attributes:
        dtype: in the words of the container (``"F32"``, ``"BF16"``), or ``"C128"``.
        shape: its shape.
        read: its elements, little-endian and in row-major order, as a stretch of bytes; called
            once, when it is its turn, so that no second tensor need be in memory.
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
    """Put a state in the place of the one that is there; killed at any moment, one of them is there.

    Args:
        path: a file ending in ``.safetensors``, or a folder, which is made; in it
            ``ema.safetensors``.
        record: what the file says about the tensors.
        tensors: by canonical name; the order does not matter, equal states give equal files.
        max_shard_size: bytes in one file; a larger state is split.

    Returns:
        The file, or the one that the index stands for.

    Raises:
        ArgumentError: ``max_shard_size`` is not positive.
        ArgumentTypeError: it is not a number.
        CheckpointError: it cannot be written, with the file and the reason.
    """
    validate.positive("max_shard_size", max_shard_size)
    with errors_of(path, "written"):
        _check_sources(tensors, {*DTYPE_BITS, "C128"})
    stored = {**tensors}
    metadata = record_to(record)
    metadata["dtype"] = ", ".join(sorted({source.dtype for source in tensors.values()}))
    pairs = [name for name, source in tensors.items() if source.dtype == "C128"]
    for name in pairs:  # the container has no such dtype: pairs of reals
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
            place.unlink(missing_ok=True)  # the index decides from its renaming on
        else:
            _write_whole(
                place,
                stored,
                lambda infos, digests: seal(metadata, infos, digests),
                lambda header: check_contents(header.metadata, header.tensors),
            )
            if exists(index_of(place)):  # until it is gone the old state is in force
                index_of(place).unlink(missing_ok=True)
        atomic.flush_folder(place.parent)
        for name in [] if old is None else old.files:
            atomic.remove(place.with_name(name))
    return place


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Source], metadata: Mapping[str, str]
) -> Path:
    """Write a plain safetensors file, whole or not at all.

    Raises:
        CheckpointError: it cannot be written, with the file and the reason.
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
            raise CheckpointError(
                f"`{shortened(name)}` is {source.dtype}, which safetensors does not have"
            )
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
        """The text of the index, once a reader would take it."""
        text = index_text(seal(metadata, infos, digests), file_of)
        check_contents(index_from(place, text).metadata, infos)
        return text

    for file, names in zip(shards, groups, strict=True):
        infos |= _infos({name: tensors[name] for name in names})
        file_of |= dict.fromkeys(names, file)
    sealed(None)  # before anything is written
    try:
        # the lock on it keeps other saves from the files of its token, until the index names them
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
        if current is None or shards[0] not in current.files:  # else the new state is in place
            for file in shards:
                atomic.remove(place.with_name(file))
        raise


_Metadata = Callable[[Mapping[str, TensorInfo], Mapping[str, str] | None], dict[str, str]]
_Check = Callable[[Header], object]
"""The checks of a reader on a header; they raise if it would refuse the header."""


def _nothing(_: Header) -> None:
    """Such a file holds no metadata of ours."""


def _infos(tensors: Mapping[str, Source]) -> dict[str, TensorInfo]:
    """Where each tensor comes to stand in a file of these."""
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
    """Tensors first, digested on the way, and the header when its digests are known.

    A reader's own checks are made of the header: before the first tensor, and of what is published.

    Returns:
        The digests.
    """
    infos = _infos(tensors)
    size = sum(info.end - info.begin for info in infos.values())
    room = build_header(infos, metadata(infos, None))
    check(parse_header(room, len(room) + size))
    _write(stream, room)
    digests = {name: _copy(name, tensors[name], stream) for name in infos}
    header = build_header(infos, metadata(infos, digests))
    if len(header) != len(room):
        raise CheckpointError("the header changed its length while the tensors were written")
    if header != room:  # that of a file of a split state holds no digests
        check(parse_header(header, len(header) + size))
        stream.seek(0)
        _write(stream, header)
    return digests


def _copy(name: str, source: Source, stream: IO[bytes]) -> str:
    read = source.read()
    try:
        data = memoryview(read)
        data = data.cast("B") if data.nbytes else memoryview(b"")  # no elements cannot be cast
    except TypeError as error:  # no buffer, or one with gaps
        raise CheckpointError(f"`{shortened(name)}` must be a stretch of bytes: {error}") from None
    if len(data) != _size(source):
        raise CheckpointError(f"`{shortened(name)}` takes {_size(source)} bytes, got {len(data)}")
    state = xxhash.xxh3_128()
    own = bytearray(min(len(data), _CHUNK))  # another thread may write into the tensor meanwhile
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
    """Wide dtypes first, so that every tensor is aligned; then by name."""
    return sorted(tensors, key=lambda name: (-DTYPE_BITS[tensors[name].dtype], name))


def _size(source: Source) -> int:
    return bits_of(source.dtype, source.shape) // 8


def _clean(place: Path) -> Index | None:
    """Remove what killed saves have left; an index that cannot be read keeps its files.

    Returns:
        The index that is in force.
    """
    temporaries, shards = unfinished(place)
    busy = {token_of(file) for file in temporaries if not atomic.remove_unlocked(file)}
    old = read_index(place, lenient=True)  # only now: it may have been published meanwhile
    if old is None and exists(index_of(place)):
        return None
    named = set() if old is None else set(old.files)
    for file in shards:
        if file.name not in named and token_of(file) not in busy:
            atomic.remove_unlocked(file)
    return old
