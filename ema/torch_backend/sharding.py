"""Shards: which part of a whole tensor lies here, and how a part becomes a ``DTensor`` again.

Averages are plain tensors that belong to the local part of a parameter, so that an update or a
swap neither communicates nor passes through the dispatcher of ``DTensor``. What is seen from
outside has the mesh and the placements of the parameter.

Nothing here loads ``torch.distributed.tensor``: where it is not loaded, no tensor is sharded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ema.errors import ModelError
from ema.torch_backend.names import is_of

__all__ = ["Place", "is_sharded", "local_of", "place_of", "wrapped_like"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a stretch of a tensor lies in the whole of it: a box.

    Attributes:
        shape: of the whole tensor.
        offsets: the index in the whole of the first element here, in each dimension; where there
            is none, the size of a dimension.
        local: the shape of what is here.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether all of it is here."""
        return self.shape == self.local

    def covers(self, other: Place) -> bool:
        """Whether everything that is at ``other`` is here too."""
        return self.shape == other.shape and (
            math.prod(other.local) == 0
            or all(
                start <= first and first + size <= start + length
                for start, length, first, size in zip(
                    self.offsets, self.local, other.offsets, other.local, strict=True
                )
            )
        )

    def part(self, tensor: Tensor, other: Place) -> Tensor:
        """The view of what is at ``other`` in ``tensor``, which lies here and covers it."""
        if math.prod(other.local) == 0:
            return tensor.new_empty(other.local)
        for dim, (start, first, size) in enumerate(
            zip(self.offsets, other.offsets, other.local, strict=True)
        ):
            tensor = tensor.narrow(dim, first - start, size)
        return tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, of any placements."""
    return is_of(tensor, "torch.distributed.tensor", "DTensor")


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


def place_of(tensor: Tensor) -> Place:
    """Which part of the whole of ``tensor`` is here; no communication.

    Shards are cut as ``torch.chunk`` cuts, one mesh dimension after the other. Under FSDP and
    tensor parallelism of one dimension (``_StridedShard``) the mesh dimensions are taken in the
    order in which the tensor was cut.

    Raises:
        ModelError: what is here is no box in the whole, or nothing that can be averaged.
    """
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return Place(shape, (0,) * len(shape), shape)
    like: Any = tensor
    mesh, placements = like.device_mesh, like.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ModelError(f"a tensor of shape {shape} lies on {mesh}, which this rank is no part of")
    offsets, sizes = [0] * len(shape), list(shape)
    for dim in range(len(shape)):
        for axis in _order(dim, placements, [mesh.size(axis) for axis in range(mesh.ndim)]):
            length = -(-sizes[dim] // mesh.size(axis))
            first = min(coordinate[axis] * length, sizes[dim])
            offsets[dim] += first
            sizes[dim] = min(length, sizes[dim] - first)
    place = Place(shape, tuple(offsets), tuple(sizes))
    here = tuple(like._local_tensor.shape)
    if here != place.local:
        raise ModelError(
            f"a tensor of shape {shape} with placements {placements} has {here} here,"
            f" {place.local} is expected"
        )
    return place


def _order(dim: int, placements: Sequence[Any], sizes: Sequence[int]) -> list[int]:
    """The mesh dimensions that cut dimension ``dim``, the one that cut first at the front.

    A plain ``Shard`` cuts before all to the right of it. A strided one cuts after as many of
    these as have ``split_factor`` shards together.
    """
    order: list[int] = []
    for axis, placement in reversed(list(enumerate(placements))):
        if placement.is_replicate():
            continue
        cuts = getattr(placement, "dim", None)
        if cuts is None or placement.is_partial():
            raise ModelError(f"a tensor with the placement {placement} is no parameter")
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
