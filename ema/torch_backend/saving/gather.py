"""Gather whole tensors on rank 0, one at a time, from the parts on all ranks.

Rank 0 says which tensor it wants next, the ranks that hold its parts send them, and rank 0 puts
them together in memory of the CPU. The other ranks, and every GPU, never hold more than their part. If rank 0 raises an error, every rank raises it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ema.errors import CheckpointError, EMAError, ModelError
from ema.torch_backend.tensors.sharding import (
    Box,
    any_sharded,
    box_at,
    counts_here,
    is_sharded,
    local_of,
)

__all__ = ["Whole", "on_first_rank"]

Whole = Callable[[Tensor], Tensor]
"""Gathers the whole of a tensor; a plain tensor is returned as it is."""

T = TypeVar("T")

_DONE = -1


def on_first_rank(tensors: Sequence[Tensor], work: Callable[[Whole], T]) -> T:
    """Do ``work`` on rank 0, with a function that gathers each of ``tensors`` when it is its turn.

    Where none of them is sharded it is done here, and nothing is communicated. Otherwise every
    rank of the process group must call this, with the same tensors.

    Args:
        tensors: in the same order on every rank.
        work: may call the function for any of them, in any order.

    Returns:
        On every rank what ``work`` returned on rank 0, which must be picklable.

    Raises:
        ModelError: the ranks hold different tensors.
        EMAError: what ``work`` raised, on every rank.
    """
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    if not any_sharded(tensors):
        return work(_as_it_is)
    _check_alike(sharded)
    index_of = {id(tensor): index for index, tensor in enumerate(sharded)}
    if dist.get_rank():
        while (index := _agree(0)) != _DONE:
            _send(sharded[index])
        served: T = _outcome(None)
        return served

    def whole(tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        _agree(index_of[id(tensor)])
        return _receive(tensor)

    outcome: tuple[Any, BaseException | None]
    try:
        outcome = work(whole), None
    except EMAError as error:
        outcome = None, error
    except BaseException as error:
        _agree(_DONE)
        _outcome((None, CheckpointError(f"rank 0 was interrupted: {error!r}")), here=error)
        raise
    _agree(_DONE)
    result: T = _outcome(outcome)
    return result


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _outcome(outcome: Any, here: BaseException | None = None) -> Any:
    """Receive the end from rank 0: a result, or an error, which is raised."""
    message = [outcome]
    dist.broadcast_object_list(message, src=0)
    result, error = message[0]
    if error is not None and here is None:
        raise error
    return result


def _check_alike(tensors: Sequence[Tensor]) -> None:
    """Refuse ranks that would not answer the same questions."""
    message = [[(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]]
    ours = message[0]
    dist.broadcast_object_list(message, src=0)
    same = torch.tensor(int(message[0] == ours), device=_device())
    dist.all_reduce(same, op=dist.ReduceOp.MIN)
    if not same.item():
        raise ModelError("the ranks hold different sharded tensors: they cannot be gathered")


def _agree(index: int) -> int:
    """Receive from rank 0 which tensor is next."""
    message = torch.tensor(index, device=_device())
    dist.broadcast(message, src=0)
    return int(message.item())


def _device(like: Tensor | None = None) -> torch.device:
    """A device whose tensors the process group can send; preferably the one they are on."""
    served = {part.partition(":")[0] for part in dist.get_backend_config().split(",")}
    preferred = "cpu" if like is None else like.device.type
    return torch.device(preferred if preferred in served else min(served))


def _holders(tensor: Any) -> dict[Box, int]:
    """The parts of a tensor and for each the first rank that holds it; empty parts do not appear."""
    mesh = tensor.device_mesh.mesh
    axes = [
        range(1 if placement.is_replicate() else size)
        for placement, size in zip(tensor.placements, mesh.shape, strict=True)
    ]
    holders: dict[Box, int] = {}
    for coordinate in product(*axes):
        box = box_at(tensor, coordinate)
        if math.prod(box.local):
            holders[box] = int(mesh[coordinate])
    return holders


def _send(tensor: Tensor) -> None:
    """Send the part here, if rank 0 asks this rank for one."""
    like: Any = tensor
    part = local_of(tensor)
    # a mesh without rank 0 is one of several that each hold all of the tensor
    if part.numel() and counts_here(tensor) and bool((like.device_mesh.mesh == 0).any()):
        dist.send(_plain(part.to(_device(part))), dst=0)


def _receive(tensor: Tensor) -> Tensor:
    """All of ``tensor``, on the CPU."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    everything = Box(tuple(tensor.shape), (0,) * tensor.dim(), tuple(tensor.shape))
    for box, rank in _holders(tensor).items():
        target = everything.part(whole, box)
        if rank == 0:
            target.copy_(local_of(tensor))
            continue
        part = torch.empty(box.local, dtype=tensor.dtype, device=_device(local_of(tensor)))
        dist.recv(_plain(part), src=rank)
        target.copy_(part)
    return whole


def _plain(tensor: Tensor) -> Tensor:
    """A form that every backend can send: contiguous, and reals in place of complex numbers."""
    tensor = tensor.resolve_conj().contiguous()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
