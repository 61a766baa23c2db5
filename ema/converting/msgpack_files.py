"""Read msgpack files of ``flax.serialization.to_bytes`` and ``flax.training.checkpoints``.

Such a file holds nested maps. An array is an extension of type 1 with ``[shape, dtype, bytes]``; a NumPy
scalar is an extension of type 3. An array beyond 1 GiB is a map ``{"__msgpack_chunked_array__": true,
"shape": {"0": …}, "chunks": {"0": …}}``. Reading needs neither Flax nor JAX, and runs no code of the file.
"""

from __future__ import annotations

import math
import mmap
from functools import partial
from pathlib import Path
from typing import Any

from ema.converting.found import Found
from ema.converting.leaves import DTYPES, Leaf, Unread
from ema.converting.train_states import found_in
from ema.errors import CheckpointError
from ema.extras import require

__all__ = ["read_msgpack"]

_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_ELSEWHERE = "//GDAPlaceholder:"
"""Start of the text that Flax writes in place of an array of several processes."""
_DEEPEST = 64


def read_msgpack(file: Path, *, name: str | None, key: str | None, averaged: bool) -> Found:
    """Find the average of a train state, or of an optimizer state with ``params_ema``.

    Raises:
        ArgumentError: the file has several averages, and ``name`` does not choose one of them.
        CheckpointError: the file is damaged, or does not hold exactly one average.
        MissingExtraError: msgpack is not installed.
    """
    unpack = require("msgpack", "jax").unpackb
    with file.open("rb") as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        tree = unpack(
            data,
            ext_hook=partial(_extension, unpack),
            object_pairs_hook=_mapping,
            strict_map_key=False,
        )
        _check_depth(tree)
    except (ValueError, CheckpointError) as error:  # msgpack raises ValueErrors
        raise CheckpointError(
            "it begins like a msgpack file of flax.serialization, but is damaged:"
            f" {str(error) or type(error).__name__:.200}"
        ) from None
    return found_in(tree, "msgpack", name=name, key=key, averaged=averaged)


def _check_depth(tree: Any, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise CheckpointError(f"it is nested more than {_DEEPEST} levels deep")
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for child in children:
        _check_depth(child, depth + 1)


def _mapping(pairs: list[tuple[Any, Any]]) -> Any:
    """A map with string keys. None for an empty map, such as ``optax.MaskedNode``."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str | int) or isinstance(key, bool) or str(key) in found:
            raise CheckpointError(f"keys must be different strings, got {key!r:.80}")
        if isinstance(value, str) and value.startswith(_ELSEWHERE):
            found[str(key)] = Unread(
                "is an array of several processes, which Flax has saved in a folder beside the"
                " file: restore it with flax.training.checkpoints"
            )
        else:
            found[str(key)] = value
    return _from_chunks(found) if _CHUNKED in found else found or None


def _extension(unpack: Any, code: int, data: bytes) -> Any:
    if code not in {_ARRAY, _SCALAR}:
        return f"an extension of type {code}"
    fields = unpack(data)
    if not isinstance(fields, list) or len(fields) != 3:
        raise CheckpointError("an array must have a shape, a dtype and bytes")
    shape, dtype, elements = fields
    if not isinstance(dtype, str) or not isinstance(elements, bytes):
        raise CheckpointError("an array must have a shape, a dtype and bytes")
    if dtype not in DTYPES:
        return Unread(f"is an array of dtype {dtype:.80}, which safetensors lacks")
    leaf = Leaf(dtype, _shape(shape), partial(_same, elements))
    if leaf.nbytes != len(elements):
        raise CheckpointError(
            f"an array of {dtype}{list(leaf.shape)!s:.80} must have {leaf.nbytes} bytes,"
            f" got {len(elements)}"
        )
    return leaf


def _from_chunks(fields: dict[str, Any]) -> Leaf:
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
    """A list that was saved as a map from positions."""
    if fields is None:
        return []
    if not isinstance(fields, dict) or fields.keys() != {str(i) for i in range(len(fields))}:
        raise CheckpointError("an array in chunks must number its chunks")
    return [fields[str(i)] for i in range(len(fields))]


def _shape(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in sizes):
        raise CheckpointError(f"a shape must be a list of sizes, got {sizes!s:.80}")
    return tuple(sizes)


def _same(elements: bytes) -> bytes:
    return elements
