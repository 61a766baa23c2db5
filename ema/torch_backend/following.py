"""The tensors of a copied module, which follow an average and the live model.

A parameter refers to the memory of its average where it can. Frozen parameters, buffers, and
parameters of another dtype or device than their average are copies, brought up to date on request.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ema.errors import EMAWarning, listing
from ema.torch_backend.distributed.sharding import local_of
from ema.torch_backend.memory import PLAIN
from ema.torch_backend.names import named_tensors
from ema.torch_backend.selection import Selection

__all__ = ["Follower", "can_share", "in_form", "sources"]


class Follower:
    """A copy of the model that shows an average.

    What the user moves or casts in it stays as it was moved, as a copy of the average, until the live
    tensor itself is moved or cast. What the user replaces in it is left alone.

    Args:
        module: the copy; it is held weakly.
        model: the live model.
        index: which of several averages it shows.

    Attributes:
        index: as given.
    """

    def __init__(self, module: nn.Module, model: nn.Module, index: int) -> None:
        self.index = index
        self._module = weakref.ref(module)
        self._model = model
        named = named_tensors(module)
        once = {id(tensor): _Parameter(tensor) for tensor in named.parameters.values()}
        self._parameters = {name: once[id(t)] for name, t in named.parameters.items()}
        self._buffers = {name: _Buffer(module, named.paths[name]) for name in named.buffers}
        self._once = list(once.values())
        self._found: Selection | None = None
        self._warned = False

    @property
    def module(self) -> nn.Module | None:
        """The copy, while it is in use."""
        return self._module()

    def follow(self, averages: Mapping[str, Tensor], found: Selection) -> None:
        """Show these averages, and whatever is not averaged as it is in the live model.

        Args:
            averages: by canonical name, the memory itself.
            found: the live tensors.

        Warns:
            EMAWarning: the live model has got parameters that the copy lacks; once.
        """
        if found is not self._found or not all(parameter.stays for parameter in self._once):
            for name, live, average in sources(averages, found):
                if name in self._parameters:
                    self._parameters[name].place(live, average)
                elif name in self._buffers:
                    self._buffers[name].place(self._model, found.paths[name], average)
            self._found = found
            self._warn_of_missing(found)
        for parameter in self._once:
            parameter.refresh()
        for buffer in self._buffers.values():
            buffer.refresh()
        increment_version(self.lent())  # a graph that has saved their former values is refused

    def lent(self) -> list[Tensor]:
        """The parameters that refer to the memory of an average."""
        return [parameter.tensor for parameter in self._once if parameter.lent]

    def _warn_of_missing(self, found: Selection) -> None:
        missing = [
            name
            for name in (*found.averaged, *found.others)
            if name not in self._parameters and name not in self._buffers
        ]
        if missing and not self._warned:
            self._warned = True
            warnings.warn(
                "a module that averaged_module() has made lacks what the model has got since:"
                f" {listing(missing)}; call averaged_module() again",
                EMAWarning,
                stacklevel=5,
            )


class _Parameter:
    """A parameter of the copy.

    Attributes:
        tensor: the parameter.
        lent: whether it refers to the memory of the average.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.lent = False
        self._plain = type(tensor) in PLAIN
        self._memory: Tensor | None = tensor.detach() if self._plain else None  # which we gave it
        self._seen = self._memory  # which it had when it was placed
        self._kind: object = None  # of the live tensor
        self._live = self._average = tensor
        self._stamp: object = None

    @property
    def stays(self) -> bool:
        """Whether it has the memory that it had."""
        return self._seen is None or self.tensor.is_set_to(self._seen)

    def place(self, live: Tensor, average: Tensor | None) -> None:
        """Let it refer to its average, or have memory of its own.

        Args:
            live: the tensor that it was copied from.
            average: None where there is none: then it follows ``live``.
        """
        first, moved, self._kind = self._kind is None, self._kind != _kind(live), _kind(live)
        if live is not self._live:
            self._stamp = _stamp(live) if first else None
        self._live, self._average = live, live if average is None else average
        if not self._plain:
            return
        was_lent, self.lent = self.lent, False
        if not moved and (self._memory is None or not self.tensor.is_set_to(self._memory)):
            self._memory = None  # the user has moved it
        elif average is not None and can_share(average, live):
            self.lent = True
            self._memory = average
        elif was_lent or _kind(self.tensor) != self._kind:
            self._memory = torch.empty_like(self._average, device=live.device, dtype=live.dtype)
        if self._memory is not None and not self.tensor.is_set_to(self._memory):
            self.tensor.data = self._memory
            self._stamp = None
        self._seen = self.tensor.detach()

    def refresh(self) -> None:
        """Copy what it follows, unless it refers to that or nothing can have changed."""
        if self.lent or (self._average is self._live and not self._has_changed()):
            return
        local_of(self.tensor).copy_(local_of(self._average))

    def _has_changed(self) -> bool:
        """Whether a live tensor that is not averaged may hold other values than before."""
        if _kind(self._live) != self._kind:
            self.place(self._live, None)
        before, self._stamp = self._stamp, _stamp(self._live)
        return self._stamp is None or self._stamp != before


class _Buffer:
    """A buffer of the copy, always with memory of its own: a forward pass may write it."""

    def __init__(self, module: nn.Module, path: str) -> None:
        self._ours, self._key = _holder(module, path)
        self._theirs: Mapping[str, Tensor | None] = {}
        self._average: Tensor | None = None
        self._kind: object = None

    def place(self, model: nn.Module, path: str, average: Tensor | None) -> None:
        """Let it follow the average or, where that is None, the buffer of ``model``."""
        self._theirs, self._key = _holder(model, path)
        self._average = average

    def refresh(self) -> None:
        """Copy what it follows; ``forward`` may have replaced the one or the other."""
        live, here = self._theirs.get(self._key), self._ours.get(self._key)
        if live is None:
            return
        source = live if self._average is None else self._average
        before, self._kind = self._kind, _kind(live)
        fits = here is not None and here.shape == live.shape and not here.is_inference()
        if here is not None and fits and before in {None, self._kind}:
            local_of(here).copy_(local_of(source))
        else:
            self._ours[self._key] = source.detach().to(live.device, live.dtype, copy=True)


def sources(
    averages: Mapping[str, Tensor], found: Selection
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Each live tensor under each of its names: the name, the tensor, and its average if it has one."""
    for kind in (found.averaged, found.others, found.buffers):
        for name, live in kind.items():
            yield name, live, averages.get(name)
    for name, (first, live) in found.ties.items():
        average = averages.get(first)
        yield name, live, None if average is None else in_form(average, local_of(live))


def can_share(average: Tensor, live: Tensor) -> bool:
    """Whether the memory of an average can be that of a copy of its live tensor."""
    return type(live) in PLAIN and _kind(average) == _kind(live)


def in_form(memory: Tensor, tensor: Tensor) -> Tensor:
    """A view of ``memory`` with the shape and the strides of ``tensor``."""
    if memory.shape == tensor.shape and memory.stride() == tensor.stride():
        return memory
    return memory.as_strided(tensor.shape, tensor.stride())


def _kind(tensor: Tensor) -> tuple[torch.device, torch.dtype, torch.Size]:
    return tensor.device, tensor.dtype, tensor.shape


def _stamp(live: Tensor) -> object:
    """Something that differs when ``live`` was written to; None where that cannot be known."""
    if live.requires_grad or live.is_inference():
        return None
    return live._version, live.data_ptr() if type(live) in PLAIN else 0


def _holder(module: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """The dict that holds a buffer of ``module``, and the key of the buffer."""
    prefix, _, key = path.rpartition(".")
    return module.get_submodule(prefix)._buffers, key
