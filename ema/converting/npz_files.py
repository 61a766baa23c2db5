"""Read archives of ``np.savez`` and ``np.savez_compressed``, one array at a time and without pickles.

Names such as ``params/dense/kernel`` (big_vision and other programs of Google) or ``params.dense.kernel``
are paths in a tree. NumPy lacks bfloat16 and writes such an array with two raw bytes per element.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from ema.checkpoint.foreign import zip_entries
from ema.converting.found import Found
from ema.converting.leaves import DTYPES, Bound, Leaf, Unread
from ema.converting.train_states import found_in
from ema.errors import CheckpointError, shortened

__all__ = ["is_npz", "read_npz"]

_CHUNK = 8 << 20
_LONGEST_HEADER = 10_000


def is_npz(file: Path) -> bool:
    """Whether the file is an archive that holds only NumPy arrays."""
    entries = zip_entries(file)
    return bool(entries) and all(entry.filename.endswith(".npy") for entry in entries or ())


def read_npz(
    file: Path, *, name: str | None, key: str | None, averaged: bool, max_bytes: int | None
) -> Found:
    """Find the average of a train state, or weights that the user says are averages.

    Args:
        file: the archive.
        name: the average of ``params_ema`` to take, if there are several.
        key: the part that is the average.
        averaged: the arrays are averages, though nothing in the archive says so.
        max_bytes: most bytes that the averages may take. By default 1 GiB or, if larger, 100 times the
            archive.

    Raises:
        ArgumentError: there are several averages of ``params_ema``, and ``name`` does not choose one of
            them.
        CheckpointError: the archive is damaged, its averages are larger than ``max_bytes``, or it does not
            hold exactly one average.
    """
    with _errors():
        tree = _tree(_leaves(file, Bound(file.stat().st_size, max_bytes)))
    found = found_in(tree, "npz", name=name, key=key, averaged=averaged)
    unnamed = [f"arr_{i}" for i in range(len(tree))]  # the names that np.savez(*arrays) gives
    if isinstance(found.tensors, dict) and found.tensors.keys() == tree.keys() == {*unnamed}:
        return dataclasses.replace(found, tensors=[found.tensors[array] for array in unnamed])
    return found


def _leaves(file: Path, bound: Bound) -> dict[str, Any]:
    archive = zipfile.ZipFile(file)  # closed once its last array is garbage
    found: dict[str, Any] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in found:
            raise CheckpointError(f"it holds two arrays that are called `{shortened(name)}`")
        if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise CheckpointError(
                f"`{shortened(name)}` is compressed in a way that np.savez does not use"
            )
        with archive.open(member) as stream:
            found[name] = _leaf(archive, member, stream, bound)
    return found


def _leaf(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, stream: IO[bytes], bound: Bound
) -> Any:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        return Unread(
            f"is an array in version {version} of NumPy's format, perhaps with named fields"
        )
    shape, by_columns, dtype = _HEADERS[version](stream, max_header_size=_LONGEST_HEADER)
    name = "bfloat16" if dtype == np.dtype("V2") else dtype.name
    if dtype.hasobject:
        return Unread("is an array of objects, which only unpickling could read")
    if dtype.kind == "V" and name != "bfloat16":
        return Unread(
            f"is an array of {dtype.itemsize} raw bytes per element: np.savez loses the dtypes of"
            " ml_dtypes; save it as float32, or with Orbax"
        )
    if name not in DTYPES:
        return Unread(f"is an array of dtype {name:.80}, which safetensors lacks")
    array = _Array(archive, member, stream.tell(), dtype, tuple(shape), by_columns)
    return Leaf(name, array.shape, array.read, partial(bound.add, array.nbytes))


_HEADERS: dict[tuple[int, int], Callable[..., Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclasses.dataclass(frozen=True)
class _Array:
    """One array of an archive, and how its elements are stored."""

    archive: zipfile.ZipFile
    member: zipfile.ZipInfo
    start: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    by_columns: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, as the header declares them."""
        return self.dtype.itemsize * math.prod(self.shape)

    def read(self) -> Any:
        """The elements as bytes, in native byte order and row-major order."""
        with _errors(), self.archive.open(self.member) as stream:
            stream.seek(self.start)
            data = bytearray(self.nbytes)
            view = memoryview(data)
            while view and (part := stream.read(min(len(view), _CHUNK))):
                view[: len(part)] = part
                view = view[len(part) :]
            if view or stream.read(1):  # reading to the end compares the checksum
                raise CheckpointError(
                    f"`{self.member.filename}` is shorter or longer than it declares"
                )
        if not self.by_columns and self.dtype.isnative:
            return data
        elements = np.frombuffer(data, self.dtype)
        array = elements.reshape(self.shape, order="F" if self.by_columns else "C")
        return np.ascontiguousarray(array, self.dtype.newbyteorder("=")).reshape(-1).view(np.uint8)


def _tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Build a tree from names that are paths. Stay flat if a name is both an array and a part with arrays."""
    separator = "/" if any("/" in name for name in leaves) else "."
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split(separator)
        node = tree
        for step in path:
            node = node.setdefault(step, {})
            if not isinstance(node, dict):
                return dict(leaves)
        if last in node:
            return dict(leaves)
        node[last] = leaf
    return tree


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Raise the errors of a damaged archive again as a ``CheckpointError``."""
    try:
        yield
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,  # a password, or a compression that zipfile lacks
        ValueError,
    ) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"it begins like an archive of np.savez, but cannot be read: {error}"
        ) from None
