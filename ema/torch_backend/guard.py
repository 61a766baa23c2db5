"""Look for NaN and Inf among the live weights before they reach the average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ema.torch_backend.distributed.sharding import local_of, meshes_of
from ema.torch_backend.gpu.kernels import all_finite
from ema.torch_backend.memory import PLAIN, real

__all__ = ["Guard"]


class Guard:
    """The tensors of a model, ready to be looked through.

    The ranks of a sharded model tell each other one number, so that all of them do the same.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # plain ones are read themselves, wherever their memory is by then, as an update reads them
        here = {name: _readable(tensor) for name, tensor in tensors.items()}
        self._tensors = {name: tensor for name, tensor in here.items() if tensor.numel()}
        self._meshes = meshes_of(tensors.values())

    @torch.no_grad()
    def all_finite(self) -> Tensor:
        """Whether there is no NaN or Inf: a bool on the device, which nobody waits for."""
        finite = all_finite(list(self._tensors.values()))
        return self._bad_anywhere((~finite).float()) == 0 if self._meshes else finite

    def nonfinite(self) -> list[str]:
        """The names of the tensors that hold NaN or Inf; reads all of them once.

        An accelerator is waited for.
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

    @torch.no_grad()
    def _nonfinite_here(self) -> list[str]:
        if not self._tensors:
            return []
        # a sum is finite only if its terms are, and takes a third of the time of a closer look
        sums = [
            tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).double().cpu()
            for tensor in self._tensors.values()
        ]
        finite = torch.stack(sums).isfinite().tolist()
        suspects = [name for name, fine in zip(self._tensors, finite, strict=True) if not fine]
        return [name for name in suspects if not bool(self._tensors[name].isfinite().all())]


def _readable(tensor: Tensor) -> Tensor:
    if type(tensor) in PLAIN and not tensor.is_complex():
        return tensor
    return real(local_of(tensor))


class Flag:
    """A bool on a device, on its way to the host since it was made.

    Asking for it waits until then, and not for what the device was given to do later.
    """

    def __init__(self, value: Tensor) -> None:
        self._value = value
        self._arrived: torch.cuda.Event | None = None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)
