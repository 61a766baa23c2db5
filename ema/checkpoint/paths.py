"""Paths of a state: one file, or an index and the files that it names.

The state ``ema.safetensors`` is either that file or, if it is split, an index
``ema.safetensors.index.json`` with files ``ema-<token>-00001-of-00003.safetensors``. If both exist, the
index is in force. A running save writes to ``.ema.safetensors.<token>.tmp``, and for a split state
to files with the same new token. It holds a lock on the temporary file. A temporary file without a lock
is left over from a killed save.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import xxhash

from ema.checkpoint import atomic
from ema.errors import ArgumentTypeError, CheckpointError, shown

__all__ = [
    "FILE_NAME",
    "errors_of",
    "exists",
    "file_to_write",
    "index_of",
    "is_shard_name",
    "new_token",
    "path_of",
    "place_of",
    "place_to_read",
    "place_to_write",
    "shard_name",
    "temporary_of",
    "token_of",
    "unfinished",
]

FILE_NAME = "ema.safetensors"
_SUFFIX = ".safetensors"
_RANDOM = "[0-9a-f]{16}"
_EXAMPLE = "0" * 16
_LONGEST = 255
"""Longest file name in bytes that common file systems allow."""


def place_to_read(path: str | os.PathLike[str]) -> Path:
    """The file to read: ``path``, or ``ema.safetensors`` in it if it is a folder.

    Links are followed, as in writing, unless an index stands beside the link itself.
    """
    place = path_of(path)
    place = place / FILE_NAME if place.is_dir() else place
    is_link = os.path.islink(place)  # noqa: PTH114 — Path.is_symlink() raises for long names
    return Path(os.path.realpath(place)) if is_link and not exists(index_of(place)) else place


def exists(file: Path) -> bool:
    """Whether the path exists. False for a name that is too long for the file system."""
    return os.path.exists(file)  # noqa: PTH110 — Path.exists() raises for long names


def path_of(path: str | os.PathLike[str]) -> Path:
    """Convert the argument to a ``Path``.

    Raises:
        ArgumentTypeError: the argument is neither a string nor a path of strings.
        CheckpointError: the path holds a zero byte, which no file system allows.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str):
        raise ArgumentTypeError(f"`path` must be a string or a path, got {shown(path)}")
    if "\0" in text:
        raise CheckpointError("no file can have this name: it holds a zero byte")
    return Path(text)


def place_to_write(path: str | os.PathLike[str]) -> Path:
    """The file to write. Creates its folder.

    A path that does not end in ``.safetensors`` means a folder, and ``ema.safetensors`` in it.

    Raises:
        CheckpointError: the path means a folder but is a file, or the file to write is not a regular file.
        OSError: the folder cannot be created.
    """
    return file_to_write(place_of(path))


def place_of(path: str | os.PathLike[str]) -> Path:
    """The file to write, as :func:`place_to_write` chooses it, without creating anything.

    Raises:
        CheckpointError: the path means a folder but is a file.
    """
    place = path_of(path)
    if place.suffix == _SUFFIX and not place.is_dir():
        return place
    if place.exists() and not place.is_dir():
        raise CheckpointError(f"it is a file: name a folder, or a file that ends in {_SUFFIX}")
    return place / FILE_NAME


def file_to_write(path: str | os.PathLike[str]) -> Path:
    """The path that a finished file can be renamed to. Creates its folder.

    Links are followed, since renaming a file over a link would destroy the link. Devices are refused for
    the same reason.

    Raises:
        CheckpointError: the path is a folder, a device or a pipe.
        OSError: the folder cannot be created.
    """
    place = Path(os.path.realpath(path_of(path)))
    if place.exists() and not place.is_file():
        raise CheckpointError("it is not a regular file: writing would replace it by one")
    _make(place.parent)
    return place


def _make(folder: Path) -> None:
    """Create a folder and its parents so that they survive a power failure."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(exist_ok=True)
    atomic.flush_folder(folder.parent)


def index_of(place: Path) -> Path:
    """The path of the index that a split state at ``place`` has."""
    return place.with_name(f"{place.name}.index.json")


def new_token() -> str:
    """The token that distinguishes the files of one save from those of another."""
    return secrets.token_hex(8)


def temporary_of(place: Path, token: str) -> Path:
    """The temporary path where a file is written before it is renamed to ``place``."""
    return place.with_name(f".{_stem_of_temporary(place)}.{token}.tmp")


def _stem_of_temporary(place: Path) -> str:
    """The name of ``place``, or its digest if the temporary name would become too long."""
    name = place.name.encode(errors="surrogateescape")
    if len(name) + len(f"..{_EXAMPLE}.tmp") <= _LONGEST:
        return place.name
    return xxhash.xxh3_64_hexdigest(name)


def shard_name(place: Path, token: str, number: int, total: int) -> str:
    """The name of one file of a split state."""
    return f"{place.stem}-{token}-{number:05d}-of-{total:05d}{_SUFFIX}"


def is_shard_name(place: Path, name: str) -> bool:
    """Whether a file of that name may belong to a split state at ``place``."""
    pattern = rf"{re.escape(place.stem)}-{_RANDOM}-[0-9]{{5}}-of-[0-9]{{5}}{re.escape(_SUFFIX)}"
    return re.fullmatch(pattern, name) is not None


def token_of(file: Path) -> str:
    """The token in the name of a temporary file or of a file of a split state."""
    tokens: list[str] = re.findall(_RANDOM, file.name)
    return tokens[-1]


def unfinished(place: Path) -> tuple[list[Path], list[Path]]:
    """Files that killed saves to ``place`` may have left: temporary files, and files of split states."""
    targets = map(_stem_of_temporary, (place, index_of(place)))
    names = "|".join(map(re.escape, targets))
    temporary = re.compile(rf"\.(?:{names})\.{_RANDOM}\.tmp")
    files = list(place.parent.iterdir())
    return (
        [file for file in files if temporary.fullmatch(file.name)],
        [file for file in files if is_shard_name(place, file.name)],
    )


@contextlib.contextmanager
def errors_of(path: str | os.PathLike[str], verb: str) -> Iterator[None]:
    """Raise every error again as a ``CheckpointError`` that names the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{_printable(path)}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{_printable(path)}: cannot be {verb}: {error}") from error


def _printable(path: str | os.PathLike[str]) -> str:
    return os.fspath(path).replace("\0", "\\0")
