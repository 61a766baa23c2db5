"""Look for NaN and Inf among the live weights before they reach the average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

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

    def nonfinite(self) -> list[str]:
        """The names of the tensors that hold NaN or Inf; reads all of them once.

        An accelerator is waited for, since the host counts the updates.
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
