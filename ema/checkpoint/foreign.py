"""Guess which program wrote a file or folder, by its first bytes and by file names."""

from __future__ import annotations

import zipfile
from pathlib import Path

from ema.checkpoint import atomic

__all__ = ["begins_like_msgpack", "seems", "zip_entries"]

_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt")
_PRETRAINED = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_READ_BY_CONVERT = "`ema convert` (ema.convert) reads averages out of it"


def seems(path: Path) -> str | None:
    """Guess what wrote a file or folder, and say what can read it. None if nothing matches.

    Raises:
        CheckpointError: the path is neither a regular file nor a folder.
        OSError: the path cannot be read.
    """
    if path.is_dir():
        return _folder(path)
    with atomic.open_file(path) as stream:
        first = stream.read(16)
    if first[8:9] == b"{":  # a safetensors file, perhaps damaged
        return None
    if first.startswith(b"PK\3\4"):
        return _zip(path)
    known = (
        (
            first.startswith(b"\x89HDF\r\n"),
            "an HDF5 file, which `ema` cannot read: save its weights with safetensors",
        ),
        (
            first[:1] == b"\x80" and first[1:2] <= b"\5",
            f"a pickle, as older versions of torch.save wrote it; {_READ_BY_CONVERT}",
        ),
        (
            begins_like_msgpack(first),
            f"a msgpack file, as flax.serialization writes it; {_READ_BY_CONVERT}",
        ),
    )
    return next((text for matches, text in known if matches), None)


def begins_like_msgpack(first: bytes) -> bool:
    """Whether a file may be a msgpack map whose first key is a string."""
    if not first or not (0x81 <= first[0] <= 0x8F or first[0] in {0xDE, 0xDF}):
        return False
    key = first[{0xDE: 3, 0xDF: 5}.get(first[0], 1) :][:1]
    return bool(key) and (0xA0 <= key[0] <= 0xBF or key[0] in {0xD9, 0xDA, 0xDB})


def _is_orbax(folder: Path) -> bool:
    """Whether Orbax wrote the folder: one checkpoint, one step of a ``CheckpointManager``, or all steps."""
    if any((folder / name).exists() for name in _ORBAX):
        return True
    items = [item for item in folder.iterdir() if item.is_dir()]
    return any((item / name).exists() for item in items for name in _ORBAX)


def _folder(folder: Path) -> str | None:
    if _is_orbax(folder):
        return f"a checkpoint of Orbax; {_READ_BY_CONVERT}"
    if (folder / ".metadata").is_file():
        return (
            "a folder of torch.distributed.checkpoint, which `ema` cannot read: convert it to one file with"
            " torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    if any(
        (folder / f"{name}{end}").exists() for name in _PRETRAINED for end in ("", ".index.json")
    ):
        return f"a folder of save_pretrained; {_READ_BY_CONVERT}"
    return None


def zip_entries(file: Path) -> list[zipfile.ZipInfo] | None:
    """The entries of a zip archive. None for any other file, or for a damaged archive.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
    ):  # everything that zipfile raises for a bad archive
        return None


def _zip(path: Path) -> str:
    entries = zip_entries(path)
    if entries is None:
        return "a damaged zip archive"
    names = [entry.filename for entry in entries]
    if any(name.endswith("data.pkl") for name in names):
        return f"a file of torch.save; {_READ_BY_CONVERT}"
    if any(name.endswith(".npy") for name in names):
        return f"an archive of numpy.savez; {_READ_BY_CONVERT}"
    return "a zip archive of other files"
