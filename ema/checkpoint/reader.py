"""Read a state: mapped into memory, checked whole before anybody gets a byte of it."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from ema.checkpoint import atomic
from ema.checkpoint.container import Header, TensorInfo, header_length, parse_header
from ema.checkpoint.contents import check_contents
from ema.checkpoint.digests import digest
from ema.checkpoint.foreign import seems
from ema.checkpoint.paths import errors_of, place_to_read
from ema.checkpoint.record import Record
from ema.checkpoint.split import Index, read_index
from ema.errors import CheckpointError, difference

__all__ = ["MappedFile", "StoredState", "StoredTensor", "open_state", "read_state"]


_MOST_OPEN = 64
"""Files of a split state that are open at a time: each takes a descriptor, of which a process has
few."""


_FEW = 1 << 20
"""Bytes that are given back at once: small tensors share pages, and each advice is a call."""


class MappedFile:
    """A safetensors file in memory: its header checked, its tensors not yet looked at.

    The system lends the memory. :meth:`bytes_of` gives the memory of the last tensor back when it goes on
    to the next, and that of small tensors when they are one MiB together. A program must not shorten the
    file meanwhile; ``ema`` never does, since it puts another file in its place.

    Args:
        place: the file.
        opened: maps of the files of a split state, the one that was used last at the end. The first
            is closed where there are too many, and made again when it is asked for.

    Raises:
        CheckpointError: the file is not a safetensors file, or is damaged; without its name.
        OSError: it cannot be read.
    """

    def __init__(self, place: Path, opened: dict[Path, mmap.mmap] | None = None) -> None:
        self._place = place
        self._opened = {} if opened is None else opened
        with atomic.open_file(place) as stream:
            self._size = size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            rest = stream.read(header_length(first, size))
            self.header: Header = parse_header(first + rest, size)
            self._keep(_map(stream))
        self._lent: tuple[int, int] | None = None

    def _keep(self, opened: mmap.mmap) -> None:
        self._opened[self._place] = opened
        while len(self._opened) > _MOST_OPEN:  # who still looks at a tensor keeps its map
            del self._opened[next(iter(self._opened))]

    def _again(self) -> mmap.mmap:
        """The map, made again where it was closed."""
        opened = self._opened.pop(self._place, None)
        if opened is None:
            try:
                with atomic.open_file(self._place) as stream:
                    if os.fstat(stream.fileno()).st_size != self._size:
                        raise CheckpointError("the file was replaced while it was being read")
                    opened = _map(stream)
            except FileNotFoundError:  # a file of a split state has another name in each save
                raise CheckpointError(
                    f"{self._place.name} is gone: another save has replaced the state while it was"
                    " being read"
                ) from None
            except OSError as error:
                raise CheckpointError(f"{self._place.name} cannot be read: {error}") from error
        self._keep(opened)
        return opened

    def bytes_of(self, info: TensorInfo) -> memoryview:
        """The bytes of a tensor; they stay readable, others are given back.

        Raises:
            CheckpointError: the file has become shorter.
        """
        start = self.header.start + info.begin
        length = info.end - info.begin
        opened = self._again()
        if opened.size() < len(opened):  # reading what is gone would end the process
            raise CheckpointError("the file was shortened while it was being read")
        if self._lent is not None and self._lent[0] <= start <= self._lent[1] and length < _FEW:
            self._lent = (self._lent[0], max(self._lent[1], start + length))
            if self._lent[1] - self._lent[0] >= _FEW:
                self.release()
        else:
            self.release()
            self._lent = (start, start + length)
        return memoryview(opened)[start : start + length]

    def release(self) -> None:
        """Give the memory of the latest tensor back; it is read again if it is looked at again."""
        opened = self._opened.get(self._place)
        if opened is not None and self._lent is not None and hasattr(opened, "madvise"):
            start, end = self._lent
            page = start - start % mmap.PAGESIZE
            with contextlib.suppress(OSError):  # advice is not needed
                opened.madvise(mmap.MADV_DONTNEED, page, end - page)
        self._lent = None


def _map(stream: IO[bytes]) -> mmap.mmap:
    # a private map is writable, as torch wants it, and never written to
    return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: in the words of the container (``"F32"``, ``"BF16"``), or ``"C128"``.
        shape: its shape.
        digest: what its bytes should give.
        file: where it is.
        info: where in it.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str
    file: MappedFile = dataclasses.field(repr=False)
    info: TensorInfo = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """How large it is."""
        return self.info.end - self.info.begin

    def bytes(self) -> memoryview:
        """Its elements, little-endian and in row-major order: a view of the file."""
        return self.file.bytes_of(self.info)

    def intact(self) -> bool:
        """Whether the bytes are those that were written."""
        return digest(self.bytes()) == self.digest


@dataclasses.dataclass(frozen=True)
class StoredState:
    """A state in a file.

    Attributes:
        place: the file, or the one that an index stands for.
        record: how far it is and how it was made.
        tensors: the averages by canonical name.
        files: the names of its files.
    """

    place: Path
    record: Record
    tensors: Mapping[str, StoredTensor]
    files: tuple[str, ...]

    def verify(self) -> None:
        """Compare every tensor with its digest.

        Raises:
            CheckpointError: some are damaged; all are listed.
        """
        with errors_of(self.place, "read"):
            self._verify()

    def _verify(self) -> None:
        damaged = [name for name, tensor in self.tensors.items() if not tensor.intact()]
        for file in {id(tensor.file): tensor.file for tensor in self.tensors.values()}.values():
            file.release()
        if damaged:
            text = difference((), (), [f"`{name:.80}` is not what was written" for name in damaged])
            raise CheckpointError(f"the data is damaged: {text}")


def read_state(path: str | os.PathLike[str]) -> StoredState:
    """Open a state and check it whole: header, metadata and the digest of every tensor.

    Args:
        path: the file, or a folder with ``ema.safetensors`` in it.

    Raises:
        CheckpointError: it cannot be read, is damaged, of a newer version or none of ours; with
            the file and the reason.

    Example:
        >>> import numpy as np, tempfile
        >>> from ema.checkpoint import Record, Source, write_state
        >>> folder = tempfile.mkdtemp()
        >>> w = np.arange(3.0, dtype=np.float32)
        >>> _ = write_state(folder, Record(step=5, count=5), {"w": Source("F32", (3,), w.tobytes)})
        >>> state = read_state(folder)
        >>> state.record.step, np.frombuffer(state.tensors["w"].bytes(), np.float32)
        (5, array([0., 1., 2.], dtype=float32))
    """
    state = open_state(path)
    state.verify()
    return state


def open_state(path: str | os.PathLike[str]) -> StoredState:
    """Open a state and check all but the data: see :meth:`StoredState.verify`.

    Raises:
        CheckpointError: see :func:`read_state`.
    """
    with errors_of(path, "read"):
        place = place_to_read(path)
    with errors_of(place, "read"):
        index = read_index(place)
        for _ in range(100):
            missing = None
            try:
                state = _open_whole(place) if index is None else _open_split(place, index)
            except FileNotFoundError as error:
                missing = error
            former, index = index, read_index(place)
            if former != index:  # another save has put a state in this one's place meanwhile
                continue
            if missing is not None:
                if Path(path).is_dir() and (kind := seems(Path(path))):
                    raise CheckpointError(f"it is not there, and its folder seems to be {kind}")
                raise missing
            return state
        raise CheckpointError("it is replaced all the time, by more than one process")


def _open_whole(place: Path) -> StoredState:
    try:
        file = MappedFile(place)
    except CheckpointError:
        if kind := seems(place):
            raise CheckpointError(f"`ema` did not write it: it seems to be {kind}") from None
        raise
    metadata, infos = file.header.metadata, file.header.tensors
    return _state(place, metadata, infos, dict.fromkeys(infos, file), (place.name,))


def _open_split(place: Path, index: Index) -> StoredState:
    files: dict[str, MappedFile] = {}
    opened: dict[Path, mmap.mmap] = {}
    for name in index.files:
        try:
            files[name] = MappedFile(place.with_name(name), opened)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
    infos: dict[str, TensorInfo] = {}
    for file, mapped in files.items():
        for name, info in mapped.header.tensors.items():
            if index.file_of.get(name) != file:
                raise CheckpointError(f"`{name:.80}` is in {file}, where it does not belong")
            infos[name] = info
    if absent := [name for name in index.file_of if name not in infos]:
        raise CheckpointError(difference(absent, ()))
    located = {name: files[index.file_of[name]] for name in infos}
    return _state(place, index.metadata, infos, located, tuple(files))


def _state(
    place: Path,
    metadata: Mapping[str, str],
    infos: Mapping[str, TensorInfo],
    files: Mapping[str, MappedFile],
    names: tuple[str, ...],
) -> StoredState:
    record, digests, pairs = check_contents(metadata, infos)
    tensors = {}
    for name, info in sorted(infos.items()):
        dtype, shape = ("C128", info.shape[:-1]) if name in pairs else (info.dtype, info.shape)
        tensors[name] = StoredTensor(dtype, shape, digests[name], files[name], info)
    return StoredState(place, record, tensors, names)
