"""Look for NaN and Inf among the live weights before they reach the average."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, _foreach_norm

from ema.torch_backend.gpu import kernels
from ema.torch_backend.tensors.memory import PLAIN, flat, is_dense, real
from ema.torch_backend.tensors.sharding import local_of, meshes_of

__all__ = ["DeviceFlag", "Guard", "all_finite", "on_every_device"]

_PIECE = 1 << 16
"""Elements of a piece; ``_foreach_norm`` holds one number for each piece on a GPU."""
_SCRATCH = 1 << 22
"""The most such numbers at a time: 16 MiB of float32."""


class Guard:
    """The tensors of a model, ready to be looked through.

    The ranks of a sharded model exchange one number, so that all of them decide alike.

    Args:
        tensors: by name.
        moving: ids of vectors that are read wherever their memory is by then. The memory of the
            others stays in its place as long as the guard is used.
    """

    def __init__(self, tensors: Mapping[str, Tensor], moving: Collection[int] = ()) -> None:
        # plain tensors are read through themselves, as in an update, so their memory may move
        here = {name: _readable(tensor) for name, tensor in tensors.items()}
        self._tensors = {name: tensor for name, tensor in here.items() if tensor.numel()}
        self._moving = moving
        self._meshes = meshes_of(tensors.values())
        self._on_accelerators: dict[torch.device, list[str]] = {}
        self._on_cpu: list[str] = []
        for name, tensor in self._tensors.items():
            if tensor.device.type == "cpu" and not kernels.available(tensor.device):
                self._on_cpu.append(name)
            else:
                self._on_accelerators.setdefault(tensor.device, []).append(name)
        self._looks: dict[torch.device, list[Callable[[], Tensor]]] = {}

    def prepare(self) -> None:
        """Prepare the checks on accelerators, and compile their kernels."""
        if not self._looks:
            for device, names in self._on_accelerators.items():
                tensors = [self._tensors[name] for name in names]
                self._looks[device] = list(_looks(device, tensors, self._moving))

    @torch.no_grad()
    def all_finite(self) -> dict[torch.device, Tensor]:
        """Whether all accelerators are free of NaN and Inf: a bool on each of them, without waiting."""
        flags = self._flags()
        if self._meshes:
            first = next(iter(flags))
            flags[first] = self._bad_anywhere((~on_every_device(flags)[first]).float()) == 0
        return on_every_device(flags)

    def nonfinite(self) -> list[str]:
        """The names of the tensors that hold NaN or Inf; reads all of them once.

        Waits for accelerators: once, unless there is such a tensor.
        """
        names = self._nonfinite_here()
        if self._meshes:
            device = torch.device(self._meshes[0].device_type)
            anywhere = self._bad_anywhere(torch.tensor(float(bool(names)), device=device))
            if not names and bool(anywhere):
                return ["(a shard of another rank)"]
        return names

    def _bad_anywhere(self, bad: Tensor) -> Tensor:
        """The largest of the numbers of all ranks."""
        for mesh in self._meshes:
            for dim in range(mesh.ndim):
                dist.all_reduce(bad, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        return bad

    def _flags(self) -> dict[torch.device, Tensor]:
        """Whether all values are finite, one flag for each accelerator."""
        self.prepare()
        flags = {device: [look() for look in looks] for device, looks in self._looks.items()}
        return {device: torch.stack(several).all() for device, several in flags.items()}

    @torch.no_grad()
    def _nonfinite_here(self) -> list[str]:
        suspects: list[str] = []
        if self._on_accelerators:
            first = next(iter(self._on_accelerators))
            if not bool(on_every_device(self._flags())[first]):
                suspects += chain.from_iterable(self._on_accelerators.values())
        if self._on_cpu:
            # a sum is finite only if its terms are, and takes a third of the time of a closer look
            sums = [
                tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).double()
                for tensor in map(self._tensors.__getitem__, self._on_cpu)
            ]
            finite = torch.stack(sums).isfinite().tolist()
            suspects += [name for name, fine in zip(self._on_cpu, finite, strict=True) if not fine]
        return [name for name in suspects if not bool(self._tensors[name].isfinite().all())]


def on_every_device(flags: Mapping[torch.device, Tensor]) -> dict[torch.device, Tensor]:
    """On each device whether all of the flags are true.

    A copy between devices waits for the current streams of both, and both wait for the copy.
    """
    if len(flags) < 2:
        return dict(flags)
    first, *others = flags
    together = flags[first]
    for device in others:
        together = together & flags[device].to(first, non_blocking=True)
    return {device: together.to(device, non_blocking=True) for device in flags}


def _looks(
    device: torch.device, tensors: Sequence[Tensor], moving: Collection[int]
) -> Iterator[Callable[[], Tensor]]:
    """The calls that tell whether the tensors on one device are finite."""
    rest = list(tensors)
    if kernels.available(device):
        fit = [tensor for tensor in tensors if id(tensor) not in moving and is_dense(tensor)]
        if fit and kernels.compiled(device, look := kernels.Look(list(map(flat, fit)))):
            yield look
            fitting = set(map(id, fit))
            rest = [tensor for tensor in tensors if id(tensor) not in fitting]
    if rest:
        yield partial(all_finite, rest)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether no element is NaN or infinite: a bool on the device of the tensors, without a sync.

    Args:
        tensors: at least one, real and of floating point, on one device, none of them empty.
    """
    alike: dict[torch.dtype, list[Tensor]] = {}
    for tensor in sorted(tensors, key=Tensor.numel):
        alike.setdefault(tensor.dtype, []).append(tensor)
    groups = [group for same in alike.values() for group in _of_bounded_scratch(same)]
    return torch.stack(
        [torch.stack(_foreach_norm(group, math.inf)).isfinite().all() for group in groups]
    ).all()


def _of_bounded_scratch(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups whose pieces, if every tensor were as large as the largest, number at most the limit.

    Args:
        tensors: the smallest first.
    """
    group: list[Tensor] = []
    for tensor in tensors:
        if group and (len(group) + 1) * -(-tensor.numel() // _PIECE) > _SCRATCH:
            yield group
            group = []
        group.append(tensor)
    yield group


def _readable(tensor: Tensor) -> Tensor:
    if type(tensor) in PLAIN and not tensor.is_complex():
        return tensor
    return real(local_of(tensor))


class DeviceFlag:
    """A bool on a device whose copy to the host begins at once.

    Asking for it waits for the check alone, and not for work that was queued after it.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._arrived: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._arrived.record()

    def has_arrived(self) -> bool:
        """Whether the value has arrived, so that asking does not wait."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)
