"""``ema.convert``: read an average that another library has saved, and write ``ema.safetensors``."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ema import validate
from ema.checkpoint import Record, Source, atomic, write_state
from ema.checkpoint.container import bits_of
from ema.checkpoint.foreign import begins_like_msgpack
from ema.checkpoint.paths import FILE_NAME, errors_of, exists, index_of, path_of, place_of
from ema.checkpoint.remainders import joined
from ema.checkpoint.renaming import Rename, renamed
from ema.converting import orbax_folders
from ema.converting.float8 import FLOAT8, widened
from ema.converting.found import Found, check_size
from ema.converting.msgpack_files import read_msgpack
from ema.converting.npz_files import is_npz, read_npz
from ema.errors import ArgumentError, ArgumentTypeError, CheckpointError, listing, warn
from ema.extras import require
from ema.schedules import Schedule, as_schedule

__all__ = ["BUFFERS", "Conversion", "convert"]

BUFFERS = ("*running_mean", "*running_var", "*num_batches_tracked")
"""Patterns of BatchNorm statistics in state dicts. They are not weights; other libraries copy or ignore them."""

_AVERAGES = ("F64", "F32", "F16", "BF16", "C64", "C128", *FLOAT8)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        place: the new file.
        kind: the kind of source that was recognized.
        record: the facts in the new file.
        names: the names of the averages.
        left_out: names of tensors in the source that were not written: integers, excluded tensors, and
            tensors beside the averages.
        notes: what the user should know about how the source was read.
    """

    place: Path
    kind: str
    record: Record
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


def convert(
    source: Any,
    target: str | os.PathLike[str],
    *,
    key: str | None = None,
    averaged: bool = False,
    force: bool = False,
    max_bytes: int | None = None,
    names: Any = None,
    exclude: str | Iterable[str] = BUFFERS,
    rename: Rename = None,
    name: str | None = None,
    step: int | None = None,
    count: int | None = None,
    decay: float | Schedule | None = None,
    update_after_step: int | None = None,
    update_every: int | None = None,
) -> Conversion:
    """Convert an average of another library to ``ema.safetensors``, which both backends load.

    Reads the following sources:

    - State dicts of diffusers' ``EMAModel``, ema-pytorch, torch-ema, ``AveragedModel``, timm
      (``state_dict_ema``), Lightning's ``WeightAveraging`` and this library, in memory or in a file of
      ``torch.save``. Such a file is read with ``weights_only=True`` and cannot run code.
    - Safetensors files, and folders of ``save_pretrained``.
    - Orbax folders, Flax's msgpack files, and ``.npz`` archives.
    - An ``nnx.EMA`` in memory.

    In any other checkpoint, the average is the part whose name says so, such as ``ema``, ``ema_params``
    or ``model_ema``, and whose tensors have the names and shapes of the weights beside it. Raw weights are
    never taken for averages: if nothing says which part is the average, this function refuses the source
    and names parts that may be one, such as a ``teacher`` or a ``target``.

    Args:
        source: a file, a folder, a state dict, or an ``nnx.EMA``.
        target: a file that ends in ``.safetensors``, or a folder, which is created.
        key: the part of the source that is the average: keys with dots between them
            (``"state.ema_params"``), or the prefix of its names in a flat state dict.
        averaged: the weights are averages, though nothing in the source says so.
        force: replace an existing file at ``target``.
        max_bytes: most bytes that the tensors may take, since a small file can declare very large tensors.
            By default 1 GiB or, if larger, a multiple of the source's size: 4 times for a file of
            torch.save, 100 times for a compressed source (``.npz``, Orbax).
        names: the names of the parameters in order, or the model. Needed for diffusers and torch-ema,
            which save a list.
        exclude: patterns of names of tensors that are not averages.
        rename: a function or table from a name in the source to the parameter's name. None as the new
            name leaves the tensor out.
        name: the average to take, if an Orbax folder or a state dict of this library holds several.
        step: steps so far. This and the next four override what the source says.
        count: updates so far. By default what the source says; if it does not, or if ``step`` is given,
            computed from the steps, ``update_after_step`` and ``update_every``.
        decay: a number or a schedule.
        update_after_step: see :class:`ema.EMAModel`.
        update_every: likewise.

    Returns:
        A description of the source and the file.

    Raises:
        ArgumentError: the source has no names, and ``names`` is missing or has the wrong length.
        CheckpointError: the source cannot be read, or does not hold exactly one average.

    Warns:
        EMAWarning: neither the source nor ``step`` says how many steps were taken.
    """
    where = source if _is_path(source) else f"the {type(source).__name__}"
    if max_bytes is not None:
        validate.integer("max_bytes", max_bytes, minimum=1)
    _check_free(target, force)
    with errors_of(where, "read"):
        options = _Options(name, key, averaged, max_bytes)
        found = _read(source, options)
        tensors = _with_names(found, names)
        kept = _averages_among(tensors, exclude)
        new_names = renamed([*kept, *found.told.get("not_averaged", ())], rename)
        written = {new: kept[old] for new, old in new_names.items() if old in kept}
        if not written:
            raise CheckpointError(f"`rename` leaves out all of the {len(kept)} averages")
        stored, parts = joined(written, _remainders(found, written, new_names))
        given = {
            "step": step,
            "count": count,
            "schedule": None if decay is None else as_schedule(decay),
            "update_after_step": update_after_step,
            "update_every": update_every,
        }
        others = tuple(new for new, old in new_names.items() if old not in kept)
        record = dataclasses.replace(_record(found, given), not_averaged=others, parts=parts)
    if found.at_users_word and not averaged:
        warn(f"{where}: {'; '.join(found.notes)}")
    place = write_state(target, record, stored)
    used = {*new_names.values()}
    left_out = (*(key for key in tensors if key not in used), *found.left_out)
    return Conversion(place, found.kind, record, tuple(written), left_out, found.notes)


def _remainders(
    found: Found, written: Iterable[str], old_names: Mapping[str, str]
) -> dict[str, Source]:
    """The remainders of the averages to write, by their new names."""
    rests = {new: found.remainders.get(old_names[new]) for new in written}
    return {new: rest for new, rest in rests.items() if rest is not None}


def _is_path(source: Any) -> bool:
    return isinstance(source, str | os.PathLike)


def _read(source: Any, options: _Options) -> Found:
    """Find the average in a source of any kind.

    Raises:
        ArgumentError: ``name`` is given, but the source holds one average without that name.
    """
    if _is_path(source):
        found = _read_path(path_of(source), options)
    else:
        found = _read_object(source, options)
    if options.name is not None and options.name != found.name:
        raise ArgumentError(
            f"`name` must be None: {found.kind} holds one average, got {options.name!r}"
        )
    return found


def _averages_among(tensors: dict[str, Source], exclude: str | Iterable[str]) -> dict[str, Source]:
    """The tensors that may be averages by their dtype and name, in dtypes that the format holds."""
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    kept = {
        key: tensor
        for key, tensor in tensors.items()
        if tensor.dtype in _AVERAGES and not any(fnmatchcase(key, p) for p in patterns)
    }
    if not kept:
        raise CheckpointError(f"none of its {len(tensors)} tensors can be an average")
    return widened(kept, tensors)


def _check_free(target: str | os.PathLike[str], force: bool) -> None:
    """Refuse to replace an existing file without ``force``, before anything is read.

    Raises:
        CheckpointError: the target exists.
    """
    with errors_of(target, "written"):
        place = place_of(target)
        if not force and (exists(place) or exists(index_of(place))):
            raise CheckpointError("there is a file already: force=True (--force) replaces it")


def _bytes_of(tensor: Source) -> int:
    pairs = 2 if tensor.dtype == "C128" else 1
    dtype = "F64" if tensor.dtype == "C128" else tensor.dtype
    return pairs * bits_of(dtype, tensor.shape) // 8


def _most(file: Path) -> int:
    """Most bytes for the tensors of a file of torch.save, which stores an expanded tensor in few bytes."""
    return max(1 << 30, 4 * file.stat().st_size)


@dataclasses.dataclass(frozen=True)
class _Options:
    """The arguments of :func:`convert` that describe the source."""

    name: str | None
    key: str | None
    averaged: bool
    max_bytes: int | None


def _read_path(path: Path, options: _Options) -> Found:
    from ema.converting import plain_sources

    name, key, averaged = options.name, options.key, options.averaged
    found: Found | None
    if path.is_dir():
        if (path / FILE_NAME).exists() or index_of(path / FILE_NAME).exists():
            raise CheckpointError(f"it holds {FILE_NAME}, which needs no conversion")
        if (checkpoint := orbax_folders.find_checkpoint(path)) is not None:
            if checkpoint.file is not None:
                found = _read_path(checkpoint.file, options)
            else:
                found = orbax_folders.read_checkpoint(
                    checkpoint, name=name, key=key, averaged=averaged, max_bytes=options.max_bytes
                )
            return dataclasses.replace(found, notes=(*checkpoint.notes, *found.notes))
        found = plain_sources.read_folder(path, key=key, averaged=averaged)
        if found is None:
            raise CheckpointError(
                "the folder holds neither safetensors weights nor an Orbax checkpoint:"
                f" it holds {listing(sorted(file.name for file in path.iterdir()), 5) or 'nothing'}"
            )
        return found
    with atomic.open_file(path) as stream:
        first = stream.read(9)
    if first[8:] == b"{":
        return plain_sources.read_safetensors(path, key=key, averaged=averaged)
    if begins_like_msgpack(first):
        return read_msgpack(path, name=name, key=key, averaged=averaged)
    if is_npz(path):
        max_bytes = options.max_bytes
        return read_npz(path, name=name, key=key, averaged=averaged, max_bytes=max_bytes)
    require("torch", "torch")
    from ema.converting import torch_sources

    most = options.max_bytes or _most(path)
    found = torch_sources.read_pickle(path, name, key=key, averaged=averaged, most=most)
    tensors = found.tensors.values() if isinstance(found.tensors, dict) else found.tensors
    check_size(sum(map(_bytes_of, tensors)), most)
    return found


def _read_object(source: Any, options: _Options) -> Found:
    if isinstance(source, Mapping):
        from ema.converting import torch_sources

        name, key, averaged = options.name, options.key, options.averaged
        return torch_sources.read_state_dict(source, name, key=key, averaged=averaged)
    nnx = sys.modules.get("flax.nnx")  # already imported if the object is an nnx.EMA
    if nnx is not None and isinstance(source, nnx.EMA):
        from ema.converting import jax_sources

        return jax_sources.read_nnx(source)
    raise ArgumentTypeError(
        f"`source` must be a path, a state dict or an nnx.EMA, got {type(source).__name__}"
    )


def _with_names(found: Found, names: Any) -> dict[str, Source]:
    if isinstance(found.tensors, dict):
        if names is not None:
            raise ArgumentError(f"`names` must be None: {found.kind} has its own names")
        return found.tensors
    if names is None:
        raise ArgumentError(
            f"`names` must be given, since {found.kind} saves a list of {len(found.tensors)} tensors:"
            " pass the names of the parameters in order, or the model"
        )
    if hasattr(names, "named_parameters"):
        names = [key for key, _ in names.named_parameters()]
    names = list(names)
    if len(names) != len(found.tensors) or len(set(names)) != len(names):
        raise ArgumentError(
            f"`names` must be {len(found.tensors)} different names, got {len(names)}:"
            f" {listing(names)}"
        )
    return dict(zip(names, found.tensors, strict=True))


def _record(found: Found, given: Mapping[str, Any]) -> Record:
    """The facts of the source, overridden by what the user gives.

    A missing count is computed from the steps and the timing.
    """
    told, given = _known_fields(found.told), _known_fields(given)
    if "step" in given:
        validate.integer("step", given["step"], minimum=0)
        told.pop("count", None)
    facts = {**told, **given}
    if "step" not in facts:
        warn(f"{found.kind} does not say how many steps were taken: the file says 0; pass step=")
        facts["step"] = 0
    if "count" not in facts:
        since = facts["step"] - facts.get("update_after_step", 0)
        facts["count"] = max(0, since) // (facts.get("update_every") or 1)
    return Record(**facts)


def _known_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not None."""
    return {field: value for field, value in fields.items() if value is not None}
