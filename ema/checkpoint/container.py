"""The safetensors container: its header, read as if it came from an enemy, and written.

A file is the length of the header (8 bytes, little-endian), the header (JSON: name → dtype, shape
and offsets, and ``__metadata__``, strings by string), and the bytes of the tensors, without a gap.
The header is checked here, whole, before anything is made of it: the rules are those of
https://huggingface.co/docs/safetensors, and a few limits besides.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ema.errors import CheckpointError

__all__ = [
    "DTYPE_BITS",
    "MAX_HEADER",
    "MAX_INDEX",
    "MAX_TENSORS",
    "Header",
    "TensorInfo",
    "bits_of",
    "build_header",
    "header_length",
    "load_json",
    "parse_header",
    "too_large",
]

DTYPE_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "C64": 64,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
}
"""Size of an element of each dtype that the container knows."""

MAX_HEADER = 100_000_000
"""Bytes of a header: as many as safetensors allows."""

MAX_INDEX = 400_000_000
"""Bytes of the index of a split state, which safetensors does not read."""

MAX_TENSORS = 20_000
"""Tensors that are written to one file; their header stays under the limits."""

_COSTS = {b"{": 250, b"[": 100, b",": 48}
"""Bytes of memory that Python takes for what begins with such a character in a JSON text, or so."""
_COST_OF_TEXT = 8
_COST_AT_LEAST = 48 << 20
"""A text may cost so many bytes for each of its own, and these besides."""

_MAX_NUMBER = 1 << 62
_MAX_DIMENSIONS = 64


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor stands and what it is; ``begin`` and ``end`` count from the first tensor."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Tensors in the order of the file, and the metadata; ``start`` is where the tensors begin."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    start: int


def parse_header(head: bytes, size: int) -> Header:
    """Check and read a header.

    Args:
        head: the file up to the end of the header; fewer bytes are an error.
        size: of the whole file.

    Raises:
        CheckpointError: with the reason, without the name of the file.
    """
    length = header_length(head[:8], size)
    text = head[8 : 8 + length]
    if not text.startswith(b"{"):
        raise CheckpointError("the header does not begin with `{`: this is not a safetensors file")
    items = load_json(text, "the header", MAX_HEADER)
    metadata = items.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError("`__metadata__` must be an object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(f"`__metadata__` must hold strings, {key!r:.80} does not")
    infos = {name: _tensor_info(name, fields) for name, fields in items.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, info in infos.items():
        if info.begin != position:
            raise CheckpointError(
                f"`{name:.80}` begins at byte {info.begin} of the data where {position} is due"
            )
        position = info.end
    if position != (data := size - 8 - length):
        raise CheckpointError(f"the tensors take {position} bytes, the file has {data} for them")
    return Header(infos, metadata, 8 + length)


def header_length(first: bytes, size: int) -> int:
    """The length that the first 8 bytes of a file tell, if it can be.

    Raises:
        CheckpointError: the file has no room for such a header, or the header is over the limit.
    """
    if size < 8 or len(first) < 8:
        raise CheckpointError(f"{size} bytes are too short for a safetensors file")
    length = int.from_bytes(first, "little")
    if length > min(size - 8, MAX_HEADER):
        raise CheckpointError(
            f"the file declares a header of {length} bytes; it has {size - 8} and {MAX_HEADER} are allowed"
        )
    return length


def load_json(text: bytes, what: str, limit: int = MAX_INDEX) -> dict[str, Any]:
    """A JSON object, whose names are unique, from text of any origin.

    Args:
        text: the object; JSON in a string of a header or an index is under their limits already.
        what: a name for the text.
        limit: its most bytes.

    Raises:
        CheckpointError: it is none, or so large or deep that reading it would cost much.
    """
    cost = sum(each * text.count(character) for character, each in _COSTS.items())
    if len(text) > limit or cost > _COST_OF_TEXT * len(text) + _COST_AT_LEAST:
        raise CheckpointError(
            f"{what} is too large: {len(text)} bytes, of which {limit} are allowed, and they take"
            f" about {cost} bytes of memory to be read, of which"
            f" {_COST_OF_TEXT * len(text) + _COST_AT_LEAST} are allowed"
        )
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8: byte {error.start}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{what} {error}") from None
    except ValueError as error:  # JSONDecodeError, and integers of too many digits
        raise CheckpointError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise CheckpointError(f"has the name {twice!r:.80} twice")
    return fields


def _no_constant(name: str) -> None:
    raise CheckpointError(f"holds {name}")


def _tensor_info(name: str, fields: object) -> TensorInfo:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"the name {name!r:.80} is not Unicode text") from None
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"`{name:.80}` must have dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"`{name:.80}` has the unknown dtype {dtype!r:.80}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"`{name:.80}` has no valid shape: {shape!r:.80}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"`{name:.80}` has no valid data_offsets: {offsets!r:.80}")
    begin, end = offsets
    if math.prod(size for size in shape if size) > _MAX_NUMBER:
        raise CheckpointError(f"`{name:.80}` has a shape that overflows: {shape!r:.80}")
    bits = bits_of(dtype, shape)
    if begin > end or bits != 8 * (end - begin):
        raise CheckpointError(
            f"`{name:.80}` is {dtype} of shape {tuple(shape)!s:.80}, which are not the"
            f" {end - begin} bytes of its data_offsets"
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MAX_NUMBER for value in values
    )


def bits_of(dtype: str, shape: Iterable[int]) -> int:
    """Bits of a tensor."""
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    return bits


def build_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length and header, padded so that the tensors begin at a multiple of 8.

    Raises:
        CheckpointError: it would be over the limit, or a name is none that a file can hold.
    """
    items: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    if "__metadata__" in infos:
        raise CheckpointError("no tensor can be called `__metadata__` in a safetensors file")
    for name, info in infos.items():
        items[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.begin, info.end],
        }
    try:
        text = json.dumps(items, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise CheckpointError("a name is not Unicode text") from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(too_large("the header", len(text), MAX_HEADER))
    return len(text).to_bytes(8, "little") + text


def too_large(what: str, size: int, limit: int) -> str:
    """The error for names and metadata that do not fit, and what helps."""
    return (
        f"{what} takes {size} bytes, {limit} are allowed: shorten `metadata`, or the names of"
        " parameters and buffers"
    )
