"""Write files atomically: if the process is killed, the previous file survives.

A new file is written under a temporary name in the same folder, flushed to disk and renamed. Then the
folder is flushed too, so that the rename survives a power failure.
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

_LOCKS = os.name == "posix"  # Windows cannot delete or rename an open file
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
    """Open a regular file for reading. Refuses a pipe or a device without waiting for it.

    Raises:
        CheckpointError: the path is not a regular file.
        OSError: the file cannot be opened.
    """
    _check_regular(file.stat())
    stream = os.fdopen(os.open(file, _READ), "rb")
    try:
        _check_regular(
            os.fstat(stream.fileno())
        )  # a pipe may have replaced the file since the first check
    except CheckpointError:
        stream.close()
        raise
    return stream


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("it is not a regular file")


@contextlib.contextmanager
def create(file: Path) -> Iterator[IO[bytes]]:
    """Create a file, and lock it while it is open."""
    # unbuffered, so that tensors are not copied once more
    with file.open("xb", buffering=0) as stream:
        if _LOCKS:
            with contextlib.suppress(OSError):  # this file system has no locks
                fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream


def keep_mode(stream: IO[bytes], old: Path) -> None:
    """Copy the permissions of the old file to the open file that replaces it."""
    if hasattr(os, "fchmod"):
        with contextlib.suppress(OSError):  # there is no old file, or another user owns it
            os.fchmod(stream.fileno(), stat.S_IMODE(old.stat().st_mode))


def rename(stream: IO[bytes], temporary: Path, place: Path) -> None:
    """Rename the open file ``temporary`` to ``place``, and wait until the rename is on disk."""
    flush(stream)
    if not _LOCKS:
        stream.close()
    temporary.replace(place)
    flush_folder(place.parent)


def flush(stream: IO[bytes]) -> None:
    """Wait until the file's content is on disk."""
    stream.flush()
    os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the folder's names are on disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such call
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(file: Path) -> None:
    """Delete a file if possible. Callers do not depend on the deletion."""
    with contextlib.suppress(OSError):
        file.unlink()


def remove_unlocked(file: Path) -> bool:
    """Delete a file that a killed save has left, unless another process holds a lock on it.

    Returns:
        Whether it is certain that no save is still writing to the file.
    """
    if not _LOCKS:
        remove(file)  # fails if the file is open
        return not file.exists()
    try:
        with open_file(file) as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(file)
    except (CheckpointError, FileNotFoundError):  # the file is a pipe, or gone
        return True
    except OSError:
        return False
    return True
