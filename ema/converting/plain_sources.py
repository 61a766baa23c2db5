"""Plain safetensors files and ``save_pretrained`` folders: weights under the names of the model."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from ema.checkpoint import Source
from ema.checkpoint.container import MAX_HEADER, load_json
from ema.checkpoint.reader import MappedFile
from ema.checkpoint.record import OWN_KEYS
from ema.converting.found import Found, diffusers_fields
from ema.errors import CheckpointError

__all__ = ["read_folder", "read_safetensors"]

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def read_safetensors(file: Path) -> Found:
    """One file of averages, as NeMo, Kohya's scripts and others write it."""
    mapped = MappedFile(file)
    notes = {key: text for key, text in mapped.header.metadata.items() if key not in OWN_KEYS}
    return Found(kind="safetensors", tensors=_sources(mapped), metadata=notes)


def read_folder(folder: Path) -> Found | None:
    """A folder that ``save_pretrained`` wrote, in one file or several; None where it is none."""
    tensors: dict[str, Source] = {}
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            tensors = _sources(MappedFile(folder / name))
        elif index.is_file():
            for file in _files_of(index):
                tensors |= _sources(MappedFile(folder / file))
        if tensors:
            break
    else:
        return None
    fields: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        config = _load(folder / "config.json")
        if "optimization_step" in config:  # put there by diffusers' EMAModel.save_pretrained
            fields = diffusers_fields(config)
    return Found(kind="save_pretrained", tensors=tensors, **fields)


def _files_of(index: Path) -> list[str]:
    files = _load(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise CheckpointError(f"{index.name} must have a weight_map")
    for file in (names := sorted(set(files.values()))):
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):  # a path could lead anywhere
            raise CheckpointError(f"{index.name} names {file!r:.80}, which is no file beside it")
    return names


def _load(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return load_json(stream.read(MAX_HEADER + 1), file.name)


def _sources(mapped: MappedFile) -> dict[str, Source]:
    return {
        name: Source(entry.dtype, entry.shape, partial(mapped.bytes_of, entry))
        for name, entry in mapped.header.entries.items()
    }
