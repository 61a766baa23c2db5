"""Detect cheaply that a model has changed since it was last inspected."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from ema.torch_backend.tensors.layouts import Layouts
from ema.torch_backend.tensors.selection import Rules, Selection
from ema.torch_backend.tensors.sharding import fully_sharded, is_sharded, reshard

__all__ = ["Fingerprint"]

_requires_grad = attrgetter("requires_grad")
_local_tensor = attrgetter("_local_tensor")  # the same object until it is replaced


class Fingerprint:
    """Everything that a selection relies on: the tensors of the modules, and where their memory lies.

    Aliases keep that memory alive, so no address is given away while it is compared with. A look at
    1 000 vectors must not take longer than a third of averaging them, so it is built from calls into
    C alone. A vector that is read through the module's own tensor may lie anywhere.

    Args:
        selection: the tensors.
        rules: whether buffers are among them.
        read: ids of vectors that an update reads wherever their memory is by then.
    """

    def __init__(self, selection: Selection, rules: Rules, read: Collection[int] = ()) -> None:
        holders = list(_holders(selection, buffers=rules.average_buffers))
        # views of the modules' own dicts, which always show the present contents
        self._childless = [module._modules for module in selection.modules if not module._modules]
        self._keys = [holder.keys() for holder in holders]
        self._values = [holder.values() for holder in holders]
        self._names: list[str] = _all(self._keys)
        self._held: list[Any] = _all(self._values)
        self._gathering = fully_sharded(selection.modules)
        self._waiting = selection.waiting
        self._pending = bool(selection.pending)
        live = selection.averaged.values()
        self._sharded = [tensor for tensor in live if is_sharded(tensor)]
        self._locals = list(map(_local_tensor, self._sharded))
        here = [*(tensor for tensor in live if not is_sharded(tensor)), *self._locals]
        tied = _tied_by_memory(selection)  # other memory for one of them parts the tie
        self._layouts = Layouts(list({id(tensor): tensor for tensor in (*here, *tied)}.values()))
        self._placed = [*(tensor for tensor in here if id(tensor) not in read), *tied]
        self._aliases = [tensor.detach() for tensor in self._placed]
        self._addresses = list(map(Tensor.data_ptr, self._placed))

    def changed(self) -> bool:
        """Whether a tensor was replaced, added, removed, renamed, unfrozen, moved, cast or reshaped.

        First frees the parameters that FSDP gathered for a forward pass and still keeps.
        """
        if not self._differs():
            return False
        if not self._gathering:
            return True
        reshard(self._gathering)
        return self._differs()

    def _differs(self) -> bool:
        held = _all(self._values)
        return (
            self._pending
            or len(held) != len(self._held)
            or not all(map(is_, held, self._held))
            or _all(self._keys) != self._names
            or any(self._childless)
            or self._layouts.changed()
            or list(map(Tensor.data_ptr, self._placed)) != self._addresses
            or not all(map(is_, map(_local_tensor, self._sharded), self._locals))
            or any(map(_requires_grad, self._waiting))
        )


def _holders(selection: Selection, *, buffers: bool) -> Iterable[Mapping[str, Any]]:
    """The dicts in which the modules keep their parameters, children and averaged buffers."""
    for module in selection.modules:
        yield module._parameters
        if module._modules:
            yield module._modules
        if buffers:
            yield module._buffers


def _tied_by_memory(selection: Selection) -> list[Tensor]:
    """The objects that are tied by lying in the same memory, not by being the same."""
    firsts = {**selection.averaged, **selection.others, **selection.buffers}
    pairs = [(firsts[first], tensor) for first, tensor in selection.ties.values()]
    apart = [pair for pair in pairs if pair[0] is not pair[1] and not any(map(is_sharded, pair))]
    return list(chain.from_iterable(apart))


def _all(views: Iterable[Iterable[Any]]) -> list[Any]:
    return list(chain.from_iterable(views))
