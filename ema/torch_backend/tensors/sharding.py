"""Shards: which part of a whole tensor lies here, and how a part becomes a ``DTensor`` again.

Averages are plain tensors that belong to the local part of a parameter, so that an update or a
swap neither communicates nor passes through the dispatcher of ``DTensor``. Users see
``DTensor``s with the mesh and the placements of the parameters.

This module does not load ``torch.distributed.tensor``: if nothing else has loaded it, no tensor is sharded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ema.errors import ModelError
from ema.torch_backend.tensors.memory import PLAIN
from ema.torch_backend.tensors.names import is_of

__all__ = [
    "Box",
    "any_sharded",
    "before_write",
    "box_at",
    "box_of",
    "check_supported",
    "counts_here",
    "fully_sharded",
    "is_sharded",
    "local_of",
    "meshes_of",
    "reshard",
    "wrapped_like",
]


@dataclasses.dataclass(frozen=True)
class Box:
    """Where a stretch of a tensor lies in the whole of it: a box.

    Attributes:
        shape: of the whole tensor.
        offsets: for each dimension, the index in the whole tensor of the first element on this
            rank; the size of the dimension if the rank holds no element.
        local: the shape of the part on this rank.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether all of it is here."""
        return self.shape == self.local

    def covers(self, other: Box) -> bool:
        """Whether it covers ``other``."""
        return self.shape == other.shape and (
            math.prod(other.local) == 0
            or all(
                start <= first and first + size <= start + length
                for start, length, first, size in zip(
                    self.offsets, self.local, other.offsets, other.local, strict=True
                )
            )
        )

    def part(self, tensor: Tensor, other: Box) -> Tensor:
        """The view of ``other`` in ``tensor``, which fills this box; the box must cover ``other``."""
        if math.prod(other.local) == 0:
            return tensor.new_empty(other.local)
        for dim, (start, first, size) in enumerate(
            zip(self.offsets, other.offsets, other.local, strict=True)
        ):
            tensor = tensor.narrow(dim, first - start, size)
        return tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, of any placements."""
    return type(tensor) not in PLAIN and is_of(tensor, "torch.distributed.tensor", "DTensor")


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is, so that their whole lies on all ranks together."""
    return any(map(is_sharded, tensors))


def meshes_of(tensors: Iterable[Tensor]) -> list[Any]:
    """The device meshes that they lie on, each once and in the same order on every rank."""
    meshes: dict[Any, None] = {}
    for tensor in tensors:
        if is_sharded(tensor):
            sharded: Any = tensor
            meshes[sharded.device_mesh] = None
    return list(meshes)


def fully_sharded(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules that ``fully_shard`` was called on."""
    return [module for module in modules if is_of(module, "torch.distributed.fsdp", "FSDPModule")]


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let go of the gathered copies that a forward pass has left in fully sharded modules.

    While there is such a copy, the module holds it in place of its shard, and the next forward
    pass uses it, even if the shard has been written since. Nothing is communicated.
    """
    for module in modules:
        sharded: Any = module
        sharded.reshard()


def before_write(modules: Iterable[nn.Module]) -> None:
    """Do the same before anything other than the optimizer writes into shards.

    The next all-gather waits for the current stream then, and not for an event that the user has
    recorded after the optimizer's step (``set_post_optim_event``), which is older than the write.
    """
    modules = list(modules)
    reshard(modules)
    for module in modules:
        sharded: Any = module
        if hasattr(sharded, "set_post_optim_event"):
            sharded.set_post_optim_event(None)


def check_supported(modules: Iterable[nn.Module], parameters: Mapping[str, Tensor]) -> None:
    """Look for engines that leave no shards that can be averaged where they are.

    Raises:
        ModelError: a module is wrapped by FSDP1, or a parameter partitioned by DeepSpeed ZeRO-3.
    """
    home, name = "torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"
    if any(is_of(module, home, name) for module in modules):
        raise ModelError(
            f"the model is wrapped by {name} (FSDP version 1), which flattens its parameters into"
            " one: use fully_shard (FSDP version 2)"
        )
    for key, parameter in parameters.items():
        if hasattr(parameter, "ds_id"):
            raise ModelError(
                f"`{key}` is partitioned by DeepSpeed ZeRO-3, which leaves it empty between steps:"
                " use ZeRO stage 1 or 2, or fully_shard (FSDP version 2)"
            )


def local_of(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that is here, all of a plain one: an alias, detached."""
    if not is_sharded(tensor):
        return tensor.detach()
    sharded: Any = tensor
    here: Tensor = sharded._local_tensor
    return here.detach()


def wrapped_like(local: Tensor, tensor: Tensor) -> Tensor:
    """``local`` as the part here of a tensor with the mesh and placements of ``tensor``."""
    if not is_sharded(tensor):
        return local
    from torch.distributed.tensor import DTensor

    like: Any = tensor
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,  # which would communicate
        shape=like.shape,
        stride=like.stride(),
    )


def counts_here(tensor: Tensor) -> bool:
    """Whether this is the first of the ranks that hold the same part of a sharded tensor."""
    like: Any = tensor
    axes = zip(like.device_mesh.get_coordinate(), like.placements, strict=True)
    return not any(index for index, placement in axes if placement.is_replicate())


def box_of(tensor: Tensor) -> Box:
    """The part of the whole of ``tensor`` that is here; nothing is communicated.

    Raises:
        ModelError: the part that is here is not a box in the whole, or cannot be averaged.
    """
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return Box(shape, (0,) * len(shape), shape)
    like: Any = tensor
    coordinate = like.device_mesh.get_coordinate()
    if coordinate is None:
        raise ModelError(
            f"a tensor of shape {shape} lies on {like.device_mesh}, which this rank does not belong to"
        )
    box = box_at(tensor, coordinate)
    here = tuple(like._local_tensor.shape)
    if here != box.local:
        raise ModelError(
            f"a tensor of shape {shape} with placements {like.placements} has {here} here,"
            f" {box.local} is expected"
        )
    return box


def box_at(tensor: Tensor, coordinate: Sequence[int]) -> Box:
    """The part of a sharded tensor that is at this coordinate of its mesh.

    Shards are cut as ``torch.chunk`` cuts, one mesh dimension after the other. Under FSDP and
    tensor parallelism of one dimension (``_StridedShard``) the mesh dimensions are taken in the
    order in which the tensor was cut.

    Raises:
        ModelError: the part that is there is not a box in the whole, or cannot be averaged.
    """
    like: Any = tensor
    shape, mesh, placements = tuple(like.shape), like.device_mesh, like.placements
    offsets, sizes = [0] * len(shape), list(shape)
    for dim in range(len(shape)):
        for axis in _order(dim, placements, [mesh.size(axis) for axis in range(mesh.ndim)]):
            length = -(-sizes[dim] // mesh.size(axis))
            first = min(coordinate[axis] * length, sizes[dim])
            offsets[dim] += first
            sizes[dim] = min(length, sizes[dim] - first)
    return Box(shape, tuple(offsets), tuple(sizes))


def _order(dim: int, placements: Sequence[Any], sizes: Sequence[int]) -> list[int]:
    """The mesh dimensions that cut dimension ``dim``, the one that cut first at the front.

    A plain ``Shard`` cuts before all placements to its right. A strided one cuts after as many of
    them as have ``split_factor`` shards together.
    """
    order: list[int] = []
    for axis, placement in reversed(list(enumerate(placements))):
        if placement.is_replicate():
            continue
        cuts = getattr(placement, "dim", None)
        if cuts is None or placement.is_partial():
            raise ModelError(f"a parameter cannot have the placement {placement}")
        if cuts != dim:
            continue
        before = getattr(placement, "split_factor", 1)
        at = 0
        while before > 1 and at < len(order) and before % sizes[order[at]] == 0:
            before //= sizes[order[at]]
            at += 1
        if before != 1:
            raise ModelError(
                f"the placements {tuple(placements)} give a rank rows that are not neighbors"
            )
        order.insert(at, axis)
    return order
