"""Read a state: map its files into memory, and check all of it before returning any of it."""

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
"""Most files of a split state to keep open, since a process has few file descriptors."""


_FEW = 1 << 20
"""Bytes of small tensors to release at once: they share pages, and each release is a system call."""


class MappedFile:
    """A safetensors file that is mapped into memory. Its header is checked, its tensors are not.

    :meth:`bytes_of` releases the memory of the previous tensor; it releases small tensors once they take
    one MiB together. No program may shorten the file in the meantime. ``ema`` never does: a save replaces
    the whole file.

    Args:
        place: the file.
        opened: the memory maps of all files of a split state, least recently used first. If there are too
            many, the first one is closed; it is opened again when it is needed.

    Raises:
        CheckpointError: the file is damaged, or not a safetensors file. The message does not name it.
        OSError: the file cannot be read.
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
        while len(self._opened) > _MOST_OPEN:  # a tensor in use keeps its map alive
            del self._opened[next(iter(self._opened))]

    def _again(self) -> mmap.mmap:
        """The map, opened again if it was closed."""
        opened = self._opened.pop(self._place, None)
        if opened is None:
            try:
                with atomic.open_file(self._place) as stream:
                    if os.fstat(stream.fileno()).st_size != self._size:
                        raise CheckpointError("the file was replaced while it was being read")
                    opened = _map(stream)
            except FileNotFoundError:  # each save of a split state uses new file names
                raise CheckpointError(
                    f"{self._place.name} is gone: another save has replaced the state while it was"
                    " being read"
                ) from None
            except OSError as error:
                raise CheckpointError(f"{self._place.name} cannot be read: {error}") from error
        self._keep(opened)
        return opened

    def bytes_of(self, info: TensorInfo) -> memoryview:
        """The bytes of a tensor, which stay readable. Releases the memory of earlier tensors.

        Raises:
            CheckpointError: the file was shortened, replaced or deleted in the meantime.
        """
        start = self.header.start + info.begin
        length = info.end - info.begin
        opened = self._again()
        if opened.size() < len(opened):  # reading beyond the end would kill the process
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
        """Release the memory of the latest tensor. A later access reads it from the file again."""
        opened = self._opened.get(self._place)
        if opened is not None and self._lent is not None and hasattr(opened, "madvise"):
            start, end = self._lent
            page = start - start % mmap.PAGESIZE
            with contextlib.suppress(OSError):  # releasing is optional
                opened.madvise(mmap.MADV_DONTNEED, page, end - page)
        self._lent = None


def _map(stream: IO[bytes]) -> mmap.mmap:
    # a private map: torch wants writable memory, though nothing writes to it
    return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: its dtype in the names of safetensors (``"F32"``, ``"BF16"``), or ``"C128"``.
        shape: its shape.
        digest: the digest of its bytes when they were written.
        file: the file that holds it.
        info: its position in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str
    file: MappedFile = dataclasses.field(repr=False)
    info: TensorInfo = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.info.end - self.info.begin

    def bytes(self) -> memoryview:
        """A view of its elements in the file, little-endian and in row-major order."""
        return self.file.bytes_of(self.info)

    def intact(self) -> bool:
        """Whether its bytes match its digest."""
        return digest(self.bytes()) == self.digest


@dataclasses.dataclass(frozen=True)
class StoredState:
    """A state in a file.

    Attributes:
        place: the file; for a split state, the file name to which its index belongs.
        record: the facts about the average.
        tensors: the tensors, by their names in the file.
        files: the names of its files.
    """

    place: Path
    record: Record
    tensors: Mapping[str, StoredTensor]
    files: tuple[str, ...]

    def verify(self) -> None:
        """Compare every tensor with its digest.

        Raises:
            CheckpointError: tensors are damaged; the message lists them.
        """
        with errors_of(self.place, "read"):
            self._verify()

    def _verify(self) -> None:
        damaged = [name for name, tensor in self.tensors.items() if not tensor.intact()]
        for file in {id(tensor.file): tensor.file for tensor in self.tensors.values()}.values():
            file.release()
        if damaged:
            text = difference((), (), [f"`{name:.80}` differs from its digest" for name in damaged])
            raise CheckpointError(f"the data is damaged: {text}")


def read_state(path: str | os.PathLike[str]) -> StoredState:
    """Open a state and check its header, its metadata and the digest of every tensor.

    Args:
        path: the file, or a folder with ``ema.safetensors`` in it.

    Raises:
        CheckpointError: the file cannot be read, is damaged, has a newer version, or was not written by
            `ema`. The message names the file and the reason.

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
    """Open a state and check its header and metadata. :meth:`StoredState.verify` checks the tensors.

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
            if former != index:  # another save has replaced this state in the meantime
                continue
            if missing is not None:
                if Path(path).is_dir() and (kind := seems(Path(path))):
                    raise CheckpointError(
                        f"the file does not exist, and its folder seems to be {kind}"
                    )
                raise missing
            return state
        raise CheckpointError(
            "several processes replace it all the time: it changed during each of 100 attempts to read it"
        )


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
