"""Files of ``flax.serialization.to_bytes``: read in place, without Flax, and nothing is executed.

The format is msgpack (https://github.com/msgpack/msgpack/blob/master/spec.md): maps of maps. An array is
an extension of type 1, in it an array ``[shape, dtype, bytes]``; type 3 is likewise a NumPy scalar, type 2
a complex number. An array beyond 1 GiB is a map ``{"__msgpack_chunked_array__": true, "shape": {"0": …},
"chunks": {"0": …}}``. Lengths are checked against the file before anything is read.
"""

from __future__ import annotations

import math
import mmap
import struct
from functools import partial
from pathlib import Path
from typing import Any

from ema.converting.found import Found
from ema.converting.leaves import DTYPES, Leaf, Unread
from ema.converting.train_states import found_in
from ema.errors import CheckpointError

__all__ = ["read_msgpack"]

_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_ELSEWHERE = "//GDAPlaceholder:"
"""How Flax begins what it writes in the place of an array of several processes."""
_DEEPEST = 64
_UNSIGNED = {1: ">B", 2: ">H", 4: ">I", 8: ">Q"}
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d",
    0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_LENGTHS = {
    0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4),
    0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4),
    0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


def read_msgpack(file: Path, *, name: str | None, key: str | None, averaged: bool) -> Found:
    """The average of a train state or of an optimizer's state with ``params_ema``.

    Raises:
        ArgumentError: there are several averages, and ``name`` is none of them.
        CheckpointError: it is damaged, or holds no average, or several.
    """
    with file.open("rb") as stream:
        data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        tree = _Reader(data).only_value()
    except CheckpointError as error:
        raise CheckpointError(
            f"it begins like a msgpack file, which flax.serialization writes, and is damaged: {error}"
        ) from None
    return found_in(tree, "msgpack", name=name, key=key, averaged=averaged)


class _Reader:
    """Values one after the other; arrays stay in the file."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._place = 0

    def only_value(self) -> Any:
        """The value after which nothing follows."""
        value = self.value()
        if self._place != len(self._data):
            raise CheckpointError(f"{len(self._data) - self._place} bytes follow its end")
        return value

    def value(self, depth: int = 0) -> Any:  # noqa: PLR0911 — one for each kind
        """The next value, a ``Leaf`` where it is an array."""
        if depth > _DEEPEST:
            raise CheckpointError(f"it is nested more than {_DEEPEST} levels deep")
        first = self._number(1)
        if first <= 0x7F or first >= 0xE0:
            return first if first <= 0x7F else first - 0x100
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            layout = _NUMBERS[first]
            return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        kind, length = self._kind(first)
        if kind == "text":
            return _text(self._take(length))
        if kind == "bytes":
            return self._take(length)
        if kind == "array":
            return [self.value(depth + 1) for _ in range(length)]
        if kind == "map":
            return self._map(length, depth)
        code = self._number(1)
        return _extension(code, self._take(length))

    def _kind(self, first: int) -> tuple[str, int]:
        if first <= 0x8F:
            return "map", first & 0x0F
        if first <= 0x9F:
            return "array", first & 0x0F
        if first <= 0xBF:
            return "text", first & 0x1F
        if first in _FIXED_EXTENSIONS:
            return "extension", _FIXED_EXTENSIONS[first]
        if first not in _LENGTHS:
            raise CheckpointError(f"msgpack has no type {first:#x}")
        kind, size = _LENGTHS[first]
        return kind, self._number(size)

    def _map(self, length: int, depth: int) -> Any:
        found: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str | int) or isinstance(key, bool) or str(key) in found:
                raise CheckpointError(f"a key must be a text of its own, got {key!r:.80}")
            value = self.value(depth + 1)
            if isinstance(value, str) and value.startswith(_ELSEWHERE):
                value = Unread(
                    "is an array of several processes, which Flax has saved in a folder beside the"
                    " file: restore it with flax.training.checkpoints"
                )
            found[str(key)] = value
        if _CHUNKED in found:
            return _joined(found)
        return found or None  # a state without fields, such as optax.MaskedNode

    def _number(self, size: int) -> int:
        (number,) = struct.unpack(_UNSIGNED[size], self._take(size))
        return int(number)

    def _take(self, length: int) -> memoryview:
        """The next bytes, where they are."""
        if length > len(self._data) - self._place:
            raise CheckpointError(
                f"it ends where {length} bytes are due: {len(self._data) - self._place} are left"
            )
        self._place += length
        return self._data[self._place - length : self._place]


def _text(data: memoryview) -> str:
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError:
        raise CheckpointError("a text is not UTF-8") from None
    return text


def _extension(code: int, data: memoryview) -> Any:
    if code not in {_ARRAY, _SCALAR}:
        return f"an extension of type {code}"
    fields = _Reader(data).only_value()
    if not isinstance(fields, list) or len(fields) != 3:
        raise CheckpointError("an array must have a shape, a dtype and bytes")
    shape, dtype, elements = fields
    if not isinstance(dtype, str) or not isinstance(elements, memoryview):
        raise CheckpointError("an array must have a shape, a dtype and bytes")
    if dtype not in DTYPES:
        return Unread(f"is an array of dtype {dtype:.80}, which safetensors lacks")
    leaf = Leaf(dtype, _shape(shape), partial(_same, elements))
    if leaf.nbytes != len(elements):
        raise CheckpointError(
            f"an array of {dtype}{list(leaf.shape)!s:.80} has {len(elements)} bytes,"
            f" and takes {leaf.nbytes}"
        )
    return leaf


def _joined(fields: dict[str, Any]) -> Leaf:
    """An array that was saved in chunks."""
    shape, chunks = (_listed(fields.get(field)) for field in ("shape", "chunks"))
    sizes = _shape(shape)
    if not chunks or not all(
        isinstance(chunk, Leaf) and chunk.dtype == chunks[0].dtype for chunk in chunks
    ):
        raise CheckpointError("an array in chunks must have chunks of one dtype")
    leaf = Leaf(chunks[0].dtype, sizes, lambda: b"".join(chunk.read() for chunk in chunks))
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(sizes):
        raise CheckpointError(f"the chunks of an array do not make the shape {sizes!s:.80}")
    return leaf


def _listed(fields: Any) -> list[Any]:
    """A list that was saved as a map from its positions."""
    if fields is None:
        return []
    if not isinstance(fields, dict) or fields.keys() != {str(i) for i in range(len(fields))}:
        raise CheckpointError("an array in chunks must number them")
    return [fields[str(i)] for i in range(len(fields))]


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in sizes):
        raise CheckpointError(f"{sizes!s:.80} is no shape")
    return tuple(sizes)


def _same(elements: memoryview) -> memoryview:
    return elements
