"""Read plain safetensors files and ``save_pretrained`` folders."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ema.checkpoint import Source
from ema.checkpoint.container import MAX_HEADER, load_json
from ema.checkpoint.reader import MappedFile
from ema.checkpoint.record import FORMAT, OWN_KEYS
from ema.converting.found import (
    Found,
    counters,
    diffusers_fields,
    lit_ema_fields,
    stripped,
    whole,
)
from ema.converting.recognize import choose
from ema.errors import CheckpointError, listing

__all__ = ["read_folder", "read_safetensors"]

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_OUR_NOTE = "ema.json"
_SCALARS = {"F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}


def read_safetensors(file: Path, *, key: str | None = None, averaged: bool = False) -> Found:
    """Find the average in one file, such as NeMo and Kohya's scripts write.

    Raises:
        CheckpointError: the file is damaged, or nothing says which of its tensors are averages.
    """
    mapped = MappedFile(file)
    if mapped.header.metadata.get("format") == FORMAT:
        raise CheckpointError("it is a file of `ema`, which needs no conversion")
    notes = {name: text for name, text in mapped.header.metadata.items() if name not in OWN_KEYS}
    found = _chosen(_sources(mapped), "safetensors", key, averaged)
    return dataclasses.replace(found, told={**found.told, "extra": notes})


def read_folder(folder: Path, *, key: str | None = None, averaged: bool = False) -> Found | None:
    """Find the average in a folder of ``save_pretrained``. None for any other folder.

    Raises:
        CheckpointError: the folder is damaged, or nothing says that it holds averages.
    """
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            tensors = _sources(MappedFile(folder / name))
        elif index.is_file():
            tensors = _sharded(folder, index)
        else:
            continue
        break
    else:
        return None
    try:
        found = _chosen(tensors, "save_pretrained", key, averaged)
    except CheckpointError as error:
        if _told_beside(folder):
            raise CheckpointError(
                "its config or notes describe averages, but such files remain in the folder when other"
                f" weights are saved there, so they are not trusted: {error}"
            ) from None
        raise
    if not found.at_users_word:
        return found
    return dataclasses.replace(found, told={**found.told, **_told_beside(folder)})


def _told_beside(folder: Path) -> dict[str, Any]:
    """Read steps and schedule from the files beside the weights."""
    if (folder / "config.json").is_file():
        config = _load(folder / "config.json")
        if "optimization_step" in config:  # written by diffusers' EMAModel.save_pretrained
            return diffusers_fields(config)
    if (folder / _OUR_NOTE).is_file():
        note = _load(folder / _OUR_NOTE)
        if note.get("weights") == "ema":  # written by this library's export from a Trainer
            return {name: whole(name, note[name]) for name in ("step", "count") if name in note}
    return {}


def _chosen(tensors: dict[str, Source], kind: str, key: str | None, averaged: bool) -> Found:
    chosen = choose(tensors, _is_source, key=key, averaged=averaged)
    names = {name: name for name in tensors} if chosen.names is None else chosen.names
    used = set(names.values())
    values = {name: _scalar(value) for name, value in chosen.beside.items()}
    fields = counters(values)
    if chosen.names is not None:
        fields |= lit_ema_fields(values)
    return stripped(
        Found(
            kind=kind if chosen.names is None else f"{chosen.kind} in {kind}",
            tensors={new: tensors[old] for new, old in names.items()},
            notes=chosen.notes,
            at_users_word=chosen.at_users_word,
            left_out=tuple(name for name in tensors if name not in used),
            told=fields,
        )
    )


def _is_source(value: Any) -> bool:
    return isinstance(value, Source)


def _scalar(value: Any) -> Any:
    """The number in a tensor of one element; any other value as it is."""
    if isinstance(value, Source) and math.prod(value.shape) == 1 and value.dtype in _SCALARS:
        return np.frombuffer(bytes(value.read()), _SCALARS[value.dtype])[0].item()
    return value


def _sharded(folder: Path, index: Path) -> dict[str, Source]:
    """Take each tensor from the file that the index names. Other files may hold stale copies."""
    weight_map = _weight_map(index)
    files = {file: _sources(MappedFile(folder / file)) for file in sorted({*weight_map.values()})}
    if missing := [name for name, file in weight_map.items() if name not in files[file]]:
        raise CheckpointError(
            f"{index.name} names {listing(missing)}, which {weight_map[missing[0]]} does not hold"
        )
    return {name: files[file][name] for name, file in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    found = _load(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index.name} must have a weight_map")
    for file in sorted({*found.values()}):
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):  # a path could lead out of the folder
            raise CheckpointError(
                f"{index.name} names {file!r:.80}, which cannot be a safetensors file in the same folder"
            )
    return found


def _load(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return load_json(stream.read(MAX_HEADER + 1), file.name)


def _sources(mapped: MappedFile) -> dict[str, Source]:
    return {
        name: Source(info.dtype, info.shape, partial(mapped.bytes_of, info))
        for name, info in mapped.header.tensors.items()
    }
