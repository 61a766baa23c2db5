"""Files that are there whole or not at all, whatever ends the process.

A file is written under another name in the same folder, flushed to the disk and renamed; then the
folder is flushed too, so that the rename itself survives a power failure.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ema.errors import CheckpointError

if TYPE_CHECKING or os.name == "posix":
    import fcntl

_LOCKS = os.name == "posix"  # Windows deletes and renames no file that is open
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

__all__ = [
    "create",
    "flush",
    "flush_folder",
    "keep_mode",
    "open_file",
    "remove",
    "remove_unlocked",
    "rename",
]


def open_file(file: Path) -> IO[bytes]:
    """Open a file to be read; a pipe or a device is refused, and neither opened nor waited for.

    Raises:
        CheckpointError: the path is not a regular file.
        OSError: it cannot be opened.
    """
    _check_regular(file.stat())
    stream = os.fdopen(os.open(file, _READ), "rb")
    try:
        _check_regular(os.fstat(stream.fileno()))  # a pipe may have come into its place since
    except CheckpointError:
        stream.close()
        raise
    return stream


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("it is not a regular file")


@contextlib.contextmanager
def create(file: Path) -> Iterator[IO[bytes]]:
    """A new file, locked while it is open."""
    # unbuffered: tensors go to the system as they are
    with file.open("xb", buffering=0) as stream:
        if _LOCKS:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream


def keep_mode(stream: IO[bytes], old: Path) -> None:
    """Give the file that is open as ``stream`` the permissions of the one that it replaces."""
    if hasattr(os, "fchmod"):
        with contextlib.suppress(OSError):  # there is none, or not ours to say
            os.fchmod(stream.fileno(), stat.S_IMODE(old.stat().st_mode))


def rename(stream: IO[bytes], temporary: Path, place: Path) -> None:
    """Put the file that is open as ``stream`` into its place, and wait until the disk has that."""
    flush(stream)
    if not _LOCKS:
        stream.close()
    temporary.replace(place)
    flush_folder(place.parent)


def flush(stream: IO[bytes]) -> None:
    """Wait until the disk has the file."""
    stream.flush()
    os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the disk has the names in the folder."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(file: Path) -> None:
    """Delete a file; one that is gone or cannot be deleted does no harm here."""
    with contextlib.suppress(OSError):
        file.unlink()


def remove_unlocked(file: Path) -> bool:
    """Delete what a killed save has left, unless another process holds a lock on it.

    Returns:
        Whether no save can be writing to it any more.
    """
    if not _LOCKS:
        remove(file)  # which fails for a file that is open
        return not file.exists()
    try:
        with open_file(file) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(file)
    except (CheckpointError, FileNotFoundError):  # a pipe, or it is gone
        return True
    except OSError:
        return False
    return True
