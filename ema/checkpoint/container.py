"""Read and write the header of a safetensors file. The reader trusts nothing in the file.

A file has three parts without gaps: the length of the header (8 bytes, little-endian); the header, a
JSON object of dtype, shape and offsets by tensor name, with string pairs under ``__metadata__``; and
the bytes of the tensors. The reader checks the whole header before it returns any of it. The rules are
those of https://huggingface.co/docs/safetensors, with a few more limits.
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
"""Bits of one element, for each dtype that safetensors has."""

MAX_HEADER = 100_000_000
"""Largest header in bytes; safetensors has the same limit."""

MAX_INDEX = 400_000_000
"""Largest index of a split state in bytes. Safetensors sets no limit here, since it does not read the index."""

MAX_TENSORS = 20_000
"""Most tensors to write to one file, so that its header stays within the limits."""

_COSTS = {b"{": 250, b"[": 100, b",": 48}
"""Estimated bytes of memory that Python needs for each of these characters in a JSON text."""
_COST_OF_TEXT = 8
_COST_AT_LEAST = 48 << 20
"""Memory that any JSON text may need, plus ``_COST_OF_TEXT`` bytes for each byte of the text."""

_MAX_NUMBER = 1 << 62
_MAX_DIMENSIONS = 64


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The header's entry for one tensor.

    Attributes:
        dtype: such as ``"F32"`` or ``"BF16"``.
        shape: the shape.
        begin: offset of the first byte, counted from the start of the first tensor.
        end: offset behind the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclasses.dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: the entry of each tensor, in the order of the file.
        metadata: the string pairs under ``__metadata__``.
        start: offset of the first tensor in the file.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    start: int


def parse_header(head: bytes, size: int) -> Header:
    """Check and read a header.

    Args:
        head: the start of the file, at least up to the end of the header.
        size: bytes of the whole file.

    Raises:
        CheckpointError: the header is invalid. The message does not name the file.
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
            raise CheckpointError(
                f"`__metadata__` must hold strings, got {type(value).__name__} for {key!r:.80}"
            )
    infos = {name: _tensor_info(name, fields) for name, fields in items.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, info in infos.items():
        if info.begin != position:
            raise CheckpointError(
                f"`{name:.80}` must begin at byte {position} of the data, got {info.begin}"
            )
        position = info.end
    if position != (data := size - 8 - length):
        raise CheckpointError(f"the tensors take {position} bytes, the file has room for {data}")
    return Header(infos, metadata, 8 + length)


def header_length(first: bytes, size: int) -> int:
    """Read the length of the header from the first 8 bytes of a file.

    Raises:
        CheckpointError: the header would be larger than the file or than ``MAX_HEADER``.
    """
    if size < 8 or len(first) < 8:
        raise CheckpointError(f"a file of {size} bytes is too short for a safetensors file")
    length = int.from_bytes(first, "little")
    if length > min(size - 8, MAX_HEADER):
        raise CheckpointError(
            f"the file declares a header of {length} bytes; the file has room for {size - 8},"
            f" and {MAX_HEADER} are allowed"
        )
    return length


def load_json(text: bytes, what: str, limit: int = MAX_INDEX) -> dict[str, Any]:
    """Read a JSON object with unique names from untrusted text.

    Args:
        text: the JSON text.
        what: a name for the text, for errors.
        limit: the most bytes that the text may have. Texts inside a header or an index are within the
            default already.

    Raises:
        CheckpointError: the text is not a JSON object, repeats a name, or would take too much memory.
    """
    cost = sum(each * text.count(character) for character, each in _COSTS.items())
    if len(text) > limit or cost > _COST_OF_TEXT * len(text) + _COST_AT_LEAST:
        raise CheckpointError(
            f"{what} is too large: it has {len(text)} bytes, {limit} are allowed; reading it takes"
            f" about {cost} bytes of memory, {_COST_OF_TEXT * len(text) + _COST_AT_LEAST} are allowed"
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
    except ValueError as error:  # JSONDecodeError, or an integer with too many digits
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
            f"`{name:.80}` is {dtype} of shape {tuple(shape)!s:.80}, which does not fit the"
            f" {end - begin} bytes of its data_offsets"
        )
    return TensorInfo(dtype, tuple(shape), begin, end)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MAX_NUMBER for value in values
    )


def bits_of(dtype: str, shape: Iterable[int]) -> int:
    """The number of bits that a tensor of this dtype and shape takes."""
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    return bits


def build_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Build the length and the header, padded so that the tensors begin at a multiple of 8 bytes.

    Raises:
        CheckpointError: the header would be too large, or a file cannot hold one of the names.
    """
    items: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    if "__metadata__" in infos:
        raise CheckpointError("a tensor of a safetensors file cannot have the name `__metadata__`")
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
    """The error text for a header or an index that is too large, with a remedy."""
    return (
        f"{what} takes {size} bytes, {limit} are allowed: shorten `metadata`, or the names of"
        " parameters and buffers"
    )
