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

if TYPE_CHECKING or os.name == "posix":
    import fcntl

LOCKS = os.name == "posix"  # Windows deletes and renames no file that is open

__all__ = ["create", "flush", "flush_folder", "keep_mode", "remove", "remove_unlocked", "rename"]


@contextlib.contextmanager
def create(file: Path) -> Iterator[IO[bytes]]:
    """A new file, locked while it is open."""
    # unbuffered: tensors go to the system as they are
    with file.open("xb", buffering=0) as stream:
        if LOCKS:
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
    if not LOCKS:
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


def remove_unlocked(file: Path) -> None:
    """Delete what a killed save has left, which nobody holds a lock on any more."""
    if not LOCKS:
        remove(file)
        return
    if not file.is_file():  # opening a pipe would wait for a writer
        return
    with contextlib.suppress(OSError), file.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove(file)
