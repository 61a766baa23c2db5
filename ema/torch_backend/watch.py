"""Notice, at the price of a glance, that a model is no longer the one that was looked at."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ema.torch_backend.distributed.sharding import fully_sharded, is_sharded, reshard
from ema.torch_backend.selection import Rules, Selection

__all__ = ["Watch"]

_nbytes = attrgetter("nbytes")
_dtype = attrgetter("dtype")
_requires_grad = attrgetter("requires_grad")
_local_tensor = attrgetter("_local_tensor")  # the same object until it is replaced


class Watch:
    """What a selection relies on: which tensors the modules hold, and where their memory lies.

    Aliases keep that memory alive, so no address is given away while it is compared with. A glance
    at 1 000 vectors takes about a quarter of what averaging them takes, so it is built from calls
    into C alone: addresses and lengths for vectors, ``is_set_to`` for what has more of a shape. Of a
    vector that is read through the module's own tensor only the size and the dtype matter.

    Args:
        selection: the tensors.
        rules: whether buffers are among them.
        read: ids of vectors that an update reads wherever their memory is by then.
    """

    def __init__(self, selection: Selection, rules: Rules, read: Collection[int] = ()) -> None:
        modules = selection.modules
        # views of the modules' own dicts: they show what is in them at any time
        holders: list[Mapping[str, Any]] = [module._parameters for module in modules]
        holders += [module._modules for module in modules if module._modules]
        if rules.average_buffers:
            holders += [module._buffers for module in modules]
        self._childless = [module._modules for module in modules if not module._modules]
        self._views = [holder.values() for holder in holders]
        self._held = self._hold()
        self._gathering = fully_sharded(modules)
        self._waiting = selection.waiting
        self._pending = bool(selection.pending)
        self._sharded = [live for live in selection.averaged.values() if is_sharded(live)]
        self._locals = list(map(_local_tensor, self._sharded))
        whole = [live for live in selection.averaged.values() if not is_sharded(live)]
        self._read = [tensor for tensor in whole if id(tensor) in read]
        rest = [*(tensor for tensor in whole if id(tensor) not in read), *self._locals]
        self._vectors = [tensor for tensor in rest if tensor.dim() == 1]
        self._others = [tensor for tensor in rest if tensor.dim() != 1]
        self._sizes = list(map(_nbytes, self._read))
        # no two kinds of real numbers take 4 bytes: there the size tells
        self._castable = [tensor for tensor in self._read if tensor.dtype != torch.float32]
        self._dtypes = list(map(_dtype, self._castable))
        self._device = self._read[0].device if self._read else None
        self._aliases = [tensor.detach() for tensor in (*self._others, *self._vectors)]
        self._addresses = list(map(Tensor.data_ptr, self._vectors))
        self._lengths = list(map(Tensor.numel, self._vectors))

    def changed(self) -> bool:
        """Whether anything was replaced, added, removed, unfrozen, moved, cast or resized.

        What FSDP has gathered for a forward pass and kept since is given up first.
        """
        if not self._differs():
            return False
        if not self._gathering:
            return True
        reshard(self._gathering)
        return self._differs()

    def _differs(self) -> bool:
        held = self._hold()
        return (
            self._pending
            or len(held) != len(self._held)
            or not all(map(is_, held, self._held))
            or any(self._childless)
            or list(map(_nbytes, self._read)) != self._sizes
            or list(map(_dtype, self._castable)) != self._dtypes
            or (bool(self._read) and self._read[0].device != self._device)
            or list(map(Tensor.data_ptr, self._vectors)) != self._addresses
            or list(map(Tensor.numel, self._vectors)) != self._lengths
            or not all(map(Tensor.is_set_to, self._others, self._aliases))
            or not all(map(is_, map(_local_tensor, self._sharded), self._locals))
            or any(map(_requires_grad, self._waiting))
        )

    def _hold(self) -> list[Any]:
        """Children and tensors of all modules."""
        return list(chain.from_iterable(self._views))
