"""Split a state over several files, and read and write the index that names them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from ema.checkpoint import atomic
from ema.checkpoint.container import MAX_INDEX, MAX_TENSORS, load_json, too_large
from ema.checkpoint.paths import exists, index_of, is_shard_name
from ema.checkpoint.record import to_json
from ema.errors import CheckpointError

__all__ = ["MAX_FILES", "MAX_NAMES", "Index", "index_from", "index_text", "read_index", "split"]

MAX_NAMES = 8_000_000
"""Most bytes of names in one file. A header holds each name up to four times."""

MAX_FILES = 99_999
"""Most files of one state: their numbers have five digits."""


@dataclasses.dataclass(frozen=True)
class Index:
    """The metadata of a split state, and the name of the file that holds each tensor."""

    metadata: dict[str, str]
    file_of: dict[str, str]

    @property
    def files(self) -> list[str]:
        """The names of the files, without repetitions."""
        return list(dict.fromkeys(self.file_of.values()))


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Split names into groups, one for each file.

    A group has at most ``limit`` bytes of tensors, unless one tensor alone is larger. It has at most
    ``MAX_TENSORS`` tensors and ``MAX_NAMES`` bytes of names, so that its header stays within the limit of
    safetensors.

    Raises:
        CheckpointError: there are more groups than a state can have files.
    """
    groups: list[list[str]] = [[]]
    taken = letters = 0
    for name, size in sizes.items():
        length = len(json.dumps(name, ensure_ascii=False).encode(errors="replace"))
        if groups[-1] and (
            taken + size > limit or len(groups[-1]) == MAX_TENSORS or letters + length > MAX_NAMES
        ):
            groups.append([])
            taken = letters = 0
        groups[-1].append(name)
        taken += size
        letters += length
    if len(groups) > MAX_FILES:
        raise CheckpointError(
            f"it would take {len(groups)} files, {MAX_FILES} are allowed: raise `max_shard_size`"
        )
    return groups


def index_text(metadata: Mapping[str, str], file_of: Mapping[str, str]) -> bytes:
    """The index as JSON, in the form that Hugging Face's tools read."""
    text = to_json({"metadata": dict(metadata), "weight_map": dict(file_of)}).encode()
    if len(text) > MAX_INDEX:
        raise CheckpointError(too_large("the index", len(text), MAX_INDEX))
    return text


def read_index(place: Path, *, lenient: bool = False) -> Index | None:
    """Read the index of the state at ``place``. None if the state is not split.

    Args:
        place: the file to which the index belongs.
        lenient: whether to return None for a damaged index too.

    Raises:
        CheckpointError: the index is damaged, or names files that cannot belong to this state.
        OSError: the index cannot be read.
    """
    file = index_of(place)
    if not exists(file):
        return None
    try:
        with atomic.open_file(file) as stream:
            text = stream.read(MAX_INDEX + 1)
        return index_from(place, text)
    except FileNotFoundError:
        return None
    except CheckpointError as error:
        if lenient and file.is_file():
            return None
        raise CheckpointError(f"{file.name}: {error}") from None


def index_from(place: Path, text: bytes) -> Index:
    """Check and read the text of an index.

    Raises:
        CheckpointError: the index is damaged, or names files that cannot belong to this state.
    """
    fields = load_json(text, "the index", MAX_INDEX)
    metadata, file_of = fields.get("metadata"), fields.get("weight_map")
    if not isinstance(metadata, dict) or not isinstance(file_of, dict):
        raise CheckpointError("the index must have metadata and weight_map")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"the metadata must hold strings, got {type(value).__name__} for {key!r:.80}"
            )
    if not all(isinstance(file, str) for file in file_of.values()):
        raise CheckpointError("`weight_map` must hold strings")
    for file in set(file_of.values()):
        if not is_shard_name(place, file):  # a path could lead out of the folder
            raise CheckpointError(
                f"the index names {file!r:.80}, which cannot be a file of this state"
            )
    return Index(metadata, file_of)
