"""Read state dicts and files of ``torch.save``, and recognize them by their keys.

Files are read with ``weights_only=True``, so that they cannot run code.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ema.checkpoint import Source
from ema.checkpoint.foreign import zip_entries
from ema.converting.found import (
    Found,
    check_size,
    counters,
    diffusers_fields,
    lit_ema_fields,
    stripped,
    whole,
)
from ema.converting.recognize import choose
from ema.converting.trees import Chosen, flattened, subtree
from ema.errors import ArgumentError, CheckpointError, EMAError, listing
from ema.schedule_descriptions import known_schedule
from ema.schedules import ConstantDecay, RampWarmup
from ema.torch_backend.saving.files import source_of
from ema.torch_backend.saving.state import State

__all__ = ["read_pickle", "read_state_dict"]


def read_pickle(
    file: Path,
    name: str | None = None,
    *,
    key: str | None = None,
    averaged: bool = False,
    most: int,
) -> Found:
    """Find the average in a file of ``torch.save``.

    Args:
        file: the file.
        name: see :func:`read_state_dict`.
        key: likewise.
        averaged: likewise.
        most: most bytes that an archive may unpack to.

    Raises:
        ArgumentError: see :func:`read_state_dict`.
        CheckpointError: the file is damaged, holds objects, or is not recognized.
    """
    _check_archive(file, most)
    try:
        # timm saves its command line, a Namespace of plain values
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickle protocols
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refused(error)) from None
    except OSError:
        raise
    except Exception as error:  # PyTorch does not document what a damaged archive raises
        raise CheckpointError(
            f"torch.save did not write it, or it is damaged: {error!r:.200}"
        ) from None
    return read_state_dict(state, name, key=key, averaged=averaged)


def _refused(error: pickle.UnpicklingError) -> str:
    """The error for a refused pickle, without PyTorch's advice to load it unsafely."""
    objects = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(
        r"find class ([\w.]+)", str(error)
    )
    if "Unsupported operand" in str(error):
        return (
            "its pickle holds more than plain values, or has a pickle_protocol of 4 or later; torch.save"
            " uses 2 by default"
        )
    if objects is None:
        return "torch.save did not write it, or it is damaged: its pickle cannot be read as plain values"
    return (
        f"it holds an object of {objects[1]:.100}, but only tensors and plain values are read, since"
        " loading an object can run any code: save its state_dict()"
    )


def _check_archive(file: Path, most: int) -> None:
    """Refuse an archive that unpacks to more than ``most`` bytes: it may be compressed 1,000 times."""
    entries = zip_entries(file) or ()  # older versions of torch.save did not write archives
    check_size(sum(entry.file_size for entry in entries), most)


def read_state_dict(
    state: Any, name: str | None = None, *, key: str | None = None, averaged: bool = False
) -> Found:
    """Recognize a state by its keys.

    Args:
        state: the state.
        name: the average to take, if there are several.
        key: the part that is the average: keys with dots between them.
        averaged: the weights are averages, though nothing in the state says so.

    Raises:
        ArgumentError: there are several averages, and ``name`` does not choose one of them.
        CheckpointError: the state is not recognized.
    """
    if not isinstance(state, Mapping):
        raise CheckpointError(f"it holds a {type(state).__name__}, not a state dict")
    exchanged = key == "ema_state_dict" and _is_exchanged(state)  # this key holds raw weights
    if (key is None or exchanged) and (found := _known(state, name)) is not None:
        return found
    chosen = choose(state, _is_tensor, key=key, averaged=averaged)
    part = subtree(state, chosen.path)
    if chosen.names is not None:
        part = {new: part[old] for new, old in chosen.names.items()}
    if isinstance(part, Mapping) and (found := _known(part, name)) is not None:
        return dataclasses.replace(found, kind=f"{found.kind} in {chosen.kind}")
    return _from_part(part, chosen, subtree(state, chosen.path))


def _from_part(part: Any, chosen: Chosen, around: Any) -> Found:
    """The chosen average, if it does not have the form of a known library.

    Args:
        part: its tensors.
        chosen: how they were chosen.
        around: the whole mapping in which they lie.
    """
    values = {each: _number(value) for each, value in chosen.beside.items()}
    told = counters(values)
    left_out: tuple[str, ...] = ()
    if chosen.names is not None:
        told |= lit_ema_fields(values)
        used = set(chosen.names.values())
        left_out = tuple(str(each) for each in around if each not in used)
    elif isinstance(part, list | tuple) and all(
        map(_is_tensor, part)
    ):  # a list: the user must pass names
        kind, listed = f"{chosen.kind} of torch.save", _listed(chosen.kind, part)
        return Found(kind=kind, tensors=listed, told=told)
    return stripped(
        Found(
            kind="state_dict" if chosen.at_users_word else f"{chosen.kind} of torch.save",
            tensors=_named(part if chosen.names is not None else _flat(part)),
            notes=chosen.notes,
            at_users_word=chosen.at_users_word,
            left_out=left_out,
            told=told,
        )
    )


def _flat(part: Any) -> dict[str, Any]:
    """The tensors of nested dicts, by their paths with dots.

    Raises:
        CheckpointError: two tensors have the same path.
    """
    tensors: dict[str, Any] = {}
    for path, tensor in flattened(part, _is_tensor):
        if (dotted := ".".join(path)) in tensors:
            raise CheckpointError(f"it holds two tensors with the name {dotted!r:.200}")
        tensors[dotted] = tensor
    return tensors


def _known(state: Mapping[Any, Any], name: str | None) -> Found | None:
    """The average of a known library, whose form alone says that it holds averages; None for others."""
    if state.keys() >= {"format_version", "averages"}:
        return _ours(state, name)
    for keys, read in _READERS:
        if keys <= state.keys() and (read is not _mmengine or _is_exchanged(state)):
            return stripped(read(state))
    return None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _ours(state: Mapping[str, Any], name: str | None) -> Found:
    labels = _labels(state["averages"])
    checked = State.from_dict(state, labels)
    label = name if labels else None
    if labels and label not in labels:
        raise ArgumentError(f"`name` must choose one of the averages {listing(labels)}")
    record = checked.record
    described: Any = record.schedule
    if label is not None and described is not None:
        described = described.get(label)
    try:
        schedule = None if described is None else known_schedule(described)
    except EMAError as error:
        raise CheckpointError(f"`schedule` does not describe a schedule: {error}") from None
    facts = (
        "step",
        "count",
        "update_after_step",
        "update_every",
        "not_averaged",
        "skipped",
        "seed",
    )
    told = {"schedule": schedule, **{fact: getattr(record, fact) for fact in facts}}
    return Found(
        kind="EMAModel.state_dict()",
        tensors=_named(checked.averages[label]),
        name=label,
        told=told,
        remainders=_named(checked.remainders.get(label, {})),
    )


def _labels(averages: Any) -> list[str]:
    """The names of several averages; empty if there is only one."""
    several = isinstance(averages, Mapping) and any(
        isinstance(tensors, Mapping) for tensors in averages.values()
    )
    return list(map(str, averages)) if several else []


def _diffusers(state: Mapping[str, Any]) -> Found:
    tensors = _listed("`shadow_params`", state["shadow_params"])
    return Found(kind="diffusers EMAModel", tensors=tensors, told=diffusers_fields(state))


def _torch_ema(state: Mapping[str, Any]) -> Found:
    """Read a state of torch-ema, which counts no steps if ``use_num_updates`` is off."""
    tensors = _listed("`shadow_params`", state["shadow_params"])
    schedule: RampWarmup | ConstantDecay
    if "decay" not in state:
        raise CheckpointError("a state of torch-ema must have `decay`")
    try:
        if state["num_updates"] is None:
            schedule = ConstantDecay(decay=state["decay"])
            return Found(kind="torch-ema", tensors=tensors, told={"schedule": schedule})
        schedule = RampWarmup(decay=state["decay"])
    except EMAError as error:
        raise CheckpointError(f"this is not a state of torch-ema: {error}") from None
    step = whole("num_updates", state["num_updates"])
    told = {"schedule": schedule, "step": step, "count": step}
    return Found(kind="torch-ema", tensors=tensors, told=told)


def _ema_pytorch(state: Mapping[str, Any]) -> Found:
    return Found(
        kind="ema-pytorch",
        tensors=_named(_below("ema_model.", state)),
        told={"step": whole("step", state["step"])},
    )


def _averaged_model(state: Mapping[str, Any]) -> Found:
    """Read an ``AveragedModel``. It counts its first copy as an update, like ``UniformAverage``."""
    step = whole("n_averaged", state["n_averaged"])
    return Found(
        kind="AveragedModel",
        tensors=_named(_below("module.", state)),
        told={"step": step, "count": step},
    )


def _lightning(state: Mapping[str, Any]) -> Found:
    averaging, tensors = state["averaging_state"], state["state_dict"]
    if not isinstance(averaging, Mapping) or not isinstance(tensors, Mapping):
        raise CheckpointError("`averaging_state` and `state_dict` must be dicts")
    step = whole("n_averaged", averaging.get("n_averaged"))
    told = {"step": step, "count": step}
    return Found(kind="Lightning WeightAveraging", tensors=_named(tensors), told=told)


def _is_exchanged(state: Mapping[str, Any]) -> bool:
    """Whether OpenMMLab's ``EMAHook`` wrote it, which swaps averages and raw weights when it saves."""
    shadow, tensors = state.get("ema_state_dict"), state.get("state_dict")
    return isinstance(shadow, Mapping) and isinstance(tensors, Mapping) and "steps" in shadow


def _mmengine(state: Mapping[str, Any]) -> Found:
    """Read an ``EMAHook``. It saves averages as ``state_dict``, and raw weights as ``ema_state_dict``."""
    shadow, tensors = state["ema_state_dict"], state["state_dict"]
    names = [name.removeprefix("module.") for name in shadow if name.startswith("module.")]
    if absent := [name for name in names if name not in tensors]:
        raise CheckpointError(f"`state_dict` lacks {listing(absent)}, which `ema_state_dict` has")
    step = whole("steps", shadow["steps"])
    return Found(
        kind="mmengine EMAHook",
        tensors=_named({name: tensors[name] for name in names}),
        told={"step": step, "count": step},
        left_out=tuple(name for name in tensors if name not in set(names)),
    )


def _timm(state: Mapping[str, Any]) -> Found:
    tensors = state["state_dict_ema"]
    if not isinstance(tensors, Mapping):
        raise CheckpointError("`state_dict_ema` must be a dict")
    return Found(kind="timm state_dict_ema", tensors=_named(tensors))


_READERS: tuple[tuple[set[str], Callable[[Mapping[str, Any]], Found]], ...] = (
    ({"shadow_params", "optimization_step"}, _diffusers),
    ({"shadow_params", "num_updates"}, _torch_ema),
    ({"initted", "step"}, _ema_pytorch),
    ({"n_averaged"}, _averaged_model),
    ({"averaging_state", "state_dict"}, _lightning),
    ({"state_dict", "ema_state_dict"}, _mmengine),
    ({"state_dict_ema"}, _timm),
)


def _below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
    if not found:
        raise CheckpointError(f"it holds no tensor whose name begins with `{prefix}`")
    return found


def _named(tensors: Mapping[str, Any]) -> dict[str, Source]:
    """Tensors by name. A tied tensor, whose memory has two names, appears under the first."""
    sources: dict[str, Source] = {}
    seen: set[object] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not isinstance(name, str):
            raise CheckpointError(
                f"{name!r:.80} must be a tensor with a string as its name, got {type(tensor).__name__}"
            )
        source = source_of(name, tensor)  # refuses tensors without strides or address
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and memory in seen:
            continue
        seen.add(memory)
        sources[name] = source
    return sources


def _listed(name: str, tensors: Any) -> list[Source]:
    if not isinstance(tensors, list | tuple) or not all(map(_is_tensor, tensors)):
        raise CheckpointError(f"{name} must be a list of tensors")
    return [source_of(f"{name.strip('`')}[{i}]", tensor) for i, tensor in enumerate(tensors)]
