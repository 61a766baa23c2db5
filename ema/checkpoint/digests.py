"""Digests of tensors and of the header, which detect damage.

xxh3_128 detects accidental damage and costs less than reading the file. It does not detect forgery:
a program that changes the file can also change the digests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from ema.checkpoint.container import TensorInfo, load_json
from ema.checkpoint.record import to_json
from ema.errors import CheckpointError, difference

__all__ = ["check_header", "digest", "read_digests", "seal"]

_EMPTY = "0" * 32


def digest(data: Any) -> str:
    """The xxh3_128 of a buffer, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def seal(
    metadata: Mapping[str, str], infos: Mapping[str, TensorInfo], digests: Mapping[str, str] | None
) -> dict[str, str]:
    """Add the digests of all tensors to the metadata and, last, the digest of the header.

    Without ``digests`` the result has the same length, so that a writer can reserve room for them.
    """
    digests = digests or dict.fromkeys(infos, _EMPTY)
    sealed = {**metadata, "digests": to_json({name: digests[name] for name in infos})}
    own = {"keys": sorted(sealed), "xxh3_128": _header_digest(sealed, sealed, infos)}
    return {**sealed, "header_digest": to_json(own)}


def check_header(metadata: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> None:
    """Compare names, dtypes, shapes and metadata with the digest of the header.

    Metadata that another program added later is not checked.

    Raises:
        CheckpointError: they differ from what was written.
    """
    own = load_json(metadata.get("header_digest", "").encode(errors="replace"), "`header_digest`")
    keys, expected = own.get("keys"), own.get("xxh3_128")
    if own.keys() != {"keys", "xxh3_128"} or not isinstance(keys, list):
        raise CheckpointError("`header_digest` must have keys and xxh3_128")
    absent = [key for key in keys if not isinstance(key, str) or key not in metadata]
    if absent:
        raise CheckpointError(f"the metadata lacks {absent[0]!r:.80}, which `header_digest` covers")
    if _header_digest(metadata, keys, infos) != expected:
        raise CheckpointError(
            "the header is damaged: names, dtypes, shapes or metadata differ from its digest"
        )


def read_digests(metadata: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Read the digest of each tensor, by name.

    Raises:
        CheckpointError: a digest is missing or malformed.
    """
    digests = load_json(metadata.get("digests", "").encode(errors="replace"), "`digests`")
    if digests.keys() != infos.keys():
        missing = [name for name in infos if name not in digests]
        unexpected = [name for name in digests if name not in infos]
        raise CheckpointError(
            f"`digests` belong to other tensors: {difference(missing, unexpected)}"
        )
    for name, value in digests.items():
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{32}", value):
            raise CheckpointError(
                f"the digest of `{name:.80}` must be 32 hexadecimal digits, got {value!r:.80}"
            )
    return digests


def _header_digest(
    metadata: Mapping[str, str], keys: Iterable[str], infos: Mapping[str, TensorInfo]
) -> str:
    tensors = {name: [info.dtype, *info.shape] for name, info in sorted(infos.items())}
    covered = {key: metadata[key] for key in sorted(keys)}
    return digest(to_json([tensors, covered]).encode(errors="surrogatepass"))
