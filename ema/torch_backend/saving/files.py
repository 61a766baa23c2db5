"""Averages to and from ``ema.safetensors``, one tensor at a time; the format is ``ema.checkpoint``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ema.checkpoint import (
    MAX_SHARD_SIZE,
    Source,
    StoredState,
    StoredTensor,
    read_state,
    write_state,
    write_tensors,
)
from ema.checkpoint.paths import errors_of
from ema.checkpoint.remainders import joined, separated
from ema.checkpoint.renaming import Rename, Transform, check_transform, renamed, transformed
from ema.errors import CheckpointError, ModelError, listing
from ema.torch_backend.saving.gather import Whole, on_first_rank
from ema.torch_backend.saving.state import State
from ema.torch_backend.tensors.copying import has_memory, host_copy, kind_of, without_values
from ema.torch_backend.tensors.memory import in_form_of, row_major
from ema.torch_backend.tensors.selection import Selection

__all__ = [
    "averaged_model",
    "averaged_state_dict",
    "check_some",
    "export",
    "load",
    "save",
    "source_of",
    "tensor_of",
]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C128": torch.complex128,
    "C64": torch.complex64,
}
"""The dtypes of averages; a plain model may hold others."""

OTHER_DTYPES = {
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_NAMES = {dtype: name for name, dtype in {**DTYPES, **OTHER_DTYPES}.items()}


def save(
    path: str | os.PathLike[str],
    state: State,
    *,
    metadata: Mapping[str, str],
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Path:
    """Write the state of one average.

    Sharded averages are gathered to rank 0, which writes them: every rank must call this.

    Args:
        path: the file or folder.
        state: the average, which has the name None in it.
        metadata: notes of the user.
        max_shard_size: bytes in one file.

    Raises:
        CheckpointError: it cannot be written; a previous file survives.
    """
    with errors_of(path, "written"):
        tensors, parts = joined(state.averages[None], state.remainders.get(None, {}))
        record = dataclasses.replace(state.record, parts=parts, extra=metadata)

    def write(whole: Whole) -> Path:
        sources = {key: source_of(key, tensor, None, whole) for key, tensor in tensors.items()}
        return write_state(path, record, sources, max_shard_size=max_shard_size)

    return on_first_rank(list(tensors.values()), write)


def load(
    path: str | os.PathLike[str], rename: Rename, transform: Transform, expected: Sequence[str]
) -> tuple[State, StoredState]:
    """The state in a file; its tensors are read when asked for.

    Args:
        path: the file or folder.
        rename: see :meth:`EMAModel.load`.
        transform: likewise.
        expected: the names of several averages, which no file holds; none for a single one.

    Raises:
        CheckpointError: it cannot be read or is damaged.
    """
    stored = read_state(path)
    record = stored.record
    with errors_of(stored.place, "read"):
        averages, remainders = separated(stored)
        if odd := [name for name, tensor in stored.tensors.items() if tensor.dtype not in DTYPES]:
            raise CheckpointError(
                f"these cannot be averages, because of their dtype: {listing(odd)}"
            )
    names = renamed([*averages, *record.not_averaged], rename)
    check_transform(transform, names)

    def under_new_names(tensors: Mapping[str, StoredTensor]) -> _Averages:
        new = {new: tensors[old] for new, old in names.items() if old in tensors}
        return _Averages(new, transform)

    others = tuple(new for new, old in names.items() if old not in averages)
    with errors_of(stored.place, "read"):
        state = State.of(
            dataclasses.replace(record, not_averaged=others),
            under_new_names(averages),
            under_new_names(remainders) if remainders else {},
            expected,
        )
    return state, stored


class _Averages(Mapping[str, Tensor]):
    """Tensors that are made each time they are asked for: never two of them in memory."""

    def __init__(self, stored: Mapping[str, StoredTensor], transform: Transform) -> None:
        self._stored = stored
        self._transform = transform

    def __getitem__(self, name: str) -> Tensor:
        value: Tensor = transformed(name, tensor_of(self._stored[name]), self._transform)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # Mapping's own would make the tensor


def export(path: str | os.PathLike[str], tensors: Mapping[str, tuple[Tensor, torch.dtype]]) -> Path:
    """Write an averaged model, see :meth:`EMAModel.export`.

    Sharded tensors are gathered to rank 0, which writes the file: every rank must call this.

    Args:
        path: the file.
        tensors: of :func:`averaged_model`.

    Raises:
        CheckpointError: it cannot be written, or holds wrappers of several tensors (torchao).
    """
    wrappers = [key for key, (tensor, _) in tensors.items() if not has_memory(tensor)]
    if wrappers:
        kinds = sorted({type(tensors[key][0]).__name__ for key in wrappers})
        raise CheckpointError(
            f"safetensors does not hold {listing(wrappers)} ({', '.join(kinds)}): save() writes the"
            " averages alone, torch.save(ema_model.averaged_state_dict(), path) everything"
        )

    def write(whole: Whole) -> Path:
        sources = {key: source_of(key, *source, whole) for key, source in tensors.items()}
        return write_tensors(path, sources, {"format": "pt"})

    return on_first_rank([tensor for tensor, _ in tensors.values()], write)


def averaged_model(
    state: Mapping[str, Any], averages: Mapping[str, Tensor], found: Selection
) -> dict[str, tuple[Tensor, torch.dtype]]:
    """The state dict of a model with the averages in it, and the dtype that each tensor has there.

    Args:
        state: ``state_dict(keep_vars=True)`` of the bare model.
        averages: by canonical name.
        found: the tensors of the model.

    Raises:
        ModelError: ``state`` holds other objects than tensors, or tensors without values (on the
            meta device), or lacks an averaged tensor.
    """
    names = {id(tensor): name for name, tensor in found.averaged.items()}
    names |= {id(tensor): first for first, tensor in found.ties.values() if first in averages}
    tensors = {}
    seen = set()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(f"`{key}` is a {type(value).__name__}, only tensors can be exported")
        name = names.get(id(value))
        if name is None:
            tensors[key] = value, value.dtype
        else:
            seen.add(name)
            average = in_form_of(value, found.averaged[name], averages[name])
            tensors[key] = average, value.dtype
    # a buffer may be one that the model keeps out of its state dict
    parameters = [name for name, live in found.averaged.items() if isinstance(live, nn.Parameter)]
    if absent := [name for name in parameters if name not in seen]:
        raise ModelError(f"the state dict of the model lacks averaged tensors: {listing(absent)}")
    _check_values({key: tensor for key, (tensor, _) in tensors.items()})
    return tensors


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    places: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        if place := without_values(tensor):
            places.setdefault(place, []).append(key)
    for place, keys in places.items():
        raise ModelError(f"{listing(keys)} {'are' if len(keys) > 1 else 'is'} {place}")


def averaged_state_dict(tensors: Mapping[str, tuple[Tensor, torch.dtype]]) -> dict[str, Tensor]:
    """The tensors of :func:`averaged_model`, whole and on the CPU: on rank 0 if any is sharded.

    A tensor with several names stays one tensor.
    """

    def collect(whole: Whole) -> None:
        for key, (tensor, dtype) in tensors.items():
            same = (id(tensor), dtype)
            if same not in made:
                made[same] = host_copy(whole(tensor), dtype)
            state[key] = made[same]

    made: dict[tuple[int, torch.dtype], Tensor] = {}
    state: dict[str, Tensor] = {}
    on_first_rank([tensor for tensor, _ in tensors.values()], collect)
    return state


def check_some(averages: Mapping[str, Tensor], found: Selection) -> None:
    """Refuse a file without averages for a model whose parameters hold no values to average.

    A lazy module may have none yet; parameters on the meta device may never have any.

    Raises:
        CheckpointError: there is no average, and parameters are on the meta device.
    """
    lacking = [name for name, tensor in found.others.items() if tensor.is_meta]
    if lacking and not averages:
        raise CheckpointError(
            f"there is no average to write: {listing(lacking)} stayed on the meta device, which"
            " holds no values"
        )


def source_of(
    name: str, tensor: Tensor, dtype: torch.dtype | None = None, whole: Whole | None = None
) -> Source:
    """A tensor for the writer; it is copied, one at a time, only where its layout or device asks.

    Args:
        name: for the error.
        tensor: of any strided layout, on any device.
        dtype: to write it in; None: its own.
        whole: gathers all of a sharded tensor here.

    Raises:
        CheckpointError: the format has no such dtype or layout, or the tensor has no values.
    """
    dtype = tensor.dtype if dtype is None else dtype
    if reason := without_values(tensor):
        raise CheckpointError(f"`{name}` is {reason}")
    if dtype not in _NAMES or tensor.layout != torch.strided or not has_memory(tensor):
        raise CheckpointError(
            f"`{name}` is {kind_of(tensor)} of {dtype} in the layout {tensor.layout}:"
            " the format has no such tensors"
        )
    return Source(_NAMES[dtype], tuple(tensor.shape), partial(_bytes_of, tensor, dtype, whole))


def _bytes_of(tensor: Tensor, dtype: torch.dtype, whole: Whole | None) -> Any:
    if whole is not None:
        tensor = whole(tensor)
    tensor = tensor.detach().resolve_conj().resolve_neg().to("cpu", dtype)
    return row_major(tensor).view(torch.uint8).numpy()


def tensor_of(stored: StoredTensor) -> Tensor:
    """A view of the file, which is not to be written to; a copy where it is not aligned."""
    dtype = {**DTYPES, **OTHER_DTYPES}[stored.dtype]
    if not stored.nbytes:
        return torch.empty(stored.shape, dtype=dtype, device="cpu")
    data = torch.frombuffer(stored.bytes(), dtype=torch.uint8)
    if data.data_ptr() % dtype.itemsize:  # torch reads 16 bytes at once and crashes
        data = data.clone()
    return data.view(dtype).reshape(stored.shape)
