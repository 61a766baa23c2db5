"""Look for NaN and Inf among the live weights before they reach the average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ema.torch_backend.kernels import all_finite
from ema.torch_backend.memory import real
from ema.torch_backend.sharding import local_of

__all__ = ["Guard"]


class Guard:
    """The tensors of a model, ready to be looked through.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        here = {name: real(local_of(tensor)) for name, tensor in tensors.items()}
        self._tensors = {name: tensor for name, tensor in here.items() if tensor.numel()}

    def all_finite(self) -> Tensor:
        """Whether there is no NaN or Inf: a bool on the device, which nobody waits for."""
        return all_finite(list(self._tensors.values()))

    def nonfinite(self) -> list[str]:
        """The names of the tensors that hold NaN or Inf; reads all of them once.

        An accelerator is waited for.
        """
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
