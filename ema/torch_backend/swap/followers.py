"""The tensors of a copied module, which follow an average and the live model.

A parameter refers to the memory of its average where it can. Frozen parameters, buffers, and
parameters of another dtype or device than their average are copies, brought up to date on request.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ema.errors import ArgumentError, listing, warn
from ema.torch_backend.swap.caches import forget_parametrizations
from ema.torch_backend.swap.exchanges import Repointing
from ema.torch_backend.tensors.memory import PLAIN
from ema.torch_backend.tensors.names import named_tensors, unwrap
from ema.torch_backend.tensors.selection import Selection
from ema.torch_backend.tensors.sharding import local_of

__all__ = ["Follower", "can_share", "refuse_follower", "repointing", "sources"]

_followers: weakref.WeakSet[Follower] = weakref.WeakSet()
"""All followers, of every average."""


class Follower:
    """A copy of the model that shows an average.

    A tensor that the user moves or casts in it becomes a copy of the average, until the live tensor
    itself is moved or cast. Parameters that the user replaces in it are left alone.

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
        _followers.add(self)

    @property
    def module(self) -> nn.Module | None:
        """The copy, while it is in use."""
        return self._module()

    def follow(self, averages: Mapping[str, Tensor], found: Selection) -> None:
        """Show these averages, and the live values of all other tensors.

        Args:
            averages: by canonical name, the memory itself.
            found: the live tensors.

        Warns:
            EMAWarning: the live model has got parameters that the copy lacks; once.
        """
        if found is not self._found or not all(parameter.stays for parameter in self._once):
            self._place(averages, found)
            self._found = found
        tensors: list[_Parameter | _Buffer] = [*self._once, *self._buffers.values()]
        _copy(chain.from_iterable(tensor.due() for tensor in tensors))
        increment_version(self.lent())  # a graph that has saved their former values is refused
        if self.module is not None:
            forget_parametrizations(self.module)
        self._warn_of_missing(found)

    def _place(self, averages: Mapping[str, Tensor], found: Selection) -> None:
        """Find the average of each tensor again by its name, as the live model has it now."""
        for name, live, average in sources(averages, found):
            if name in self._parameters:
                self._parameters[name].place(live, average)
            elif name in self._buffers:
                self._buffers[name].place(self._model, found.paths[name], average)

    def lent(self) -> list[Tensor]:
        """The parameters that refer to the memory of an average."""
        return [parameter.tensor for parameter in self._once if parameter.lent]

    def _warn_of_missing(self, found: Selection) -> None:
        if self._warned:
            return
        known = {*self._parameters, *self._buffers}
        now = {**found.averaged, **found.others}
        # the model itself may have become the home of a copy
        copies = {id(parameter.tensor) for each in _followers for parameter in each._once}
        if missing := [n for n, t in now.items() if n not in known and id(t) not in copies]:
            self._warned = True
            warn(
                "a module from averaged_module() lacks parameters that the model has got since:"
                f" {listing(missing)}; call averaged_module() again"
            )


class _Parameter:
    """A parameter of the copy.

    Attributes:
        tensor: the parameter.
        lent: whether it refers to the memory of the average.
        live: the tensor of the live model that has its name.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.lent = False
        self._plain = type(tensor) in PLAIN
        self._memory: Tensor | None = tensor.detach() if self._plain else None  # which we gave it
        self._seen = self._memory  # which it had when it was placed
        self._kind: object = None  # of the live tensor
        self.live = tensor
        self._average: Tensor | None = None
        self._stamp: object = None

    @property
    def stays(self) -> bool:
        """Whether it has the memory that it had."""
        return self._seen is None or _refers_to(self.tensor, self._seen)

    def place(self, live: Tensor, average: Tensor | None) -> None:
        """Let it refer to its average, or have memory of its own.

        Args:
            live: the tensor that it was copied from.
            average: None if the tensor is not averaged: then it follows ``live``.
        """
        first, moved, self._kind = self._kind is None, self._kind != _kind(live), _kind(live)
        if live is not self.live:
            self._stamp = _stamp(live) if first else None
        elif average is None and self._average is not None:
            self._stamp = None  # it has shown the average so far
        self.live, self._average = live, average
        if not self._plain:
            return
        was_lent, self.lent = self.lent, False
        if not moved and (self._memory is None or not _refers_to(self.tensor, self._memory)):
            self._memory = None  # the user has moved it
        else:
            self._choose_memory(was_lent=was_lent)
        if self._memory is not None and not _refers_to(self.tensor, self._memory):
            self.tensor.data = self._memory
            self._stamp = None
        self._seen = self.tensor.detach()

    def _choose_memory(self, *, was_lent: bool) -> None:
        """The memory of the average if it can be shared, or memory of its own if it needs any."""
        live, average = self.live, self._average
        if average is not None and can_share(average, live):
            self.lent = True
            self._memory = average
        elif was_lent or _kind(self.tensor) != self._kind:
            like = live if average is None else average
            self._memory = torch.empty_like(like, device=live.device, dtype=live.dtype)

    def due(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Its memory and what to copy into it, unless nothing can have changed."""
        if self.lent or (self._average is None and not self._has_changed()):
            return
        here = local_of(self.tensor) if self._seen is None else self._seen
        yield here, local_of(self.live) if self._average is None else self._average

    def _has_changed(self) -> bool:
        """Whether a live tensor that is not averaged may hold other values than before."""
        if _kind(self.live) != self._kind:
            self.place(self.live, None)
        before, self._stamp = self._stamp, _stamp(self.live)
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

    def due(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Its memory and what to copy into it; ``forward`` may have replaced the one or the other."""
        live, here = _held(self._theirs, self._key), _held(self._ours, self._key)
        if live is None:
            return
        source = live if self._average is None else self._average
        before, self._kind = self._kind, _kind(live)
        fits = here is not None and here.shape == live.shape and not here.is_inference()
        if here is not None and fits and before in {None, self._kind}:
            yield local_of(here), local_of(source)
        else:
            self._ours[self._key] = source.detach().to(live.device, live.dtype, copy=True)


def repointing(moved: Iterable[tuple[Tensor, Tensor]]) -> Repointing:
    """A part of a swap: parameters of copies show the same values before, during and after it.

    Args:
        moved: memory, and where its values are during the swap.
    """
    if not _followers:
        return Repointing([])
    by_address = {memory.data_ptr(): (memory, there) for memory, there in moved}
    return Repointing(
        [
            (tensor, tensor.detach(), _in_form(there, tensor, memory))
            for follower in _followers
            for tensor in follower.lent()
            if tensor.numel() and tensor.data_ptr() in by_address
            for memory, there in [by_address[tensor.data_ptr()]]
        ]
    )


def refuse_follower(model: nn.Module) -> None:
    """Make sure that averages are not written into a copy whose parameters are averages.

    Raises:
        ArgumentError: ``model`` follows an average.
    """
    if any(follower.module is unwrap(model) for follower in _followers):
        raise ArgumentError(
            "`model` must not be a module that averaged_module() has made, since its parameters are"
            f" averages; got that of a {type(unwrap(model)).__name__}"
        )


def sources(
    averages: Mapping[str, Tensor], found: Selection
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Each live tensor under each of its names: the name, the tensor, and its average if it has one."""
    firsts = {**found.averaged, **found.others, **found.buffers}
    for name, live in firsts.items():
        yield name, live, averages.get(name)
    for name, (first, live) in found.ties.items():
        average = averages.get(first)
        if average is not None:  # which has no gaps where the live tensors have some
            average = _in_form(average, local_of(live), local_of(firsts[first]))
        yield name, live, average


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first one."""
    plain: tuple[list[Tensor], list[Tensor]] = [], []
    for here, source in pairs:
        if type(here) in PLAIN and type(source) in PLAIN:
            plain[0].append(here)
            plain[1].append(source)
        else:
            here.copy_(source)
    if plain[0]:
        torch._foreach_copy_(*plain)


def can_share(average: Tensor, live: Tensor) -> bool:
    """Whether the memory of an average can be that of a copy of its live tensor."""
    return type(live) in PLAIN and _kind(average) == _kind(live)


def _in_form(memory: Tensor, tensor: Tensor, like: Tensor) -> Tensor:
    """``memory`` as ``tensor`` sees the memory of ``like``."""
    if tensor.shape == like.shape and tensor.stride() == like.stride():
        return memory
    return memory.as_strided(tensor.shape, tensor.stride())


def _refers_to(tensor: Tensor, memory: Tensor) -> bool:
    """Whether a tensor shows this memory in the same form; ``is_set_to`` does not look at dtypes."""
    return tensor.dtype == memory.dtype and tensor.is_set_to(memory)


def _kind(tensor: Tensor) -> tuple[torch.device, torch.dtype, torch.Size]:
    return tensor.device, tensor.dtype, tensor.shape


def _stamp(live: Tensor) -> object:
    """A mark that changes when ``live`` is written to; None if PyTorch does not tell."""
    if live.requires_grad or live.is_inference():
        return None
    return live._version, live.data_ptr() if type(live) in PLAIN else 0


def _holder(module: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """The dict that holds a buffer of ``module``, and the key of the buffer."""
    *parents, key = path.split(".")
    for name in parents:
        module = cast("nn.Module", module._modules[name])
    return module._buffers, key


def _held(holder: Mapping[str, Any], key: str) -> Tensor | None:
    """The value of a key, or None; the holder of a scripted module has no ``get``."""
    return holder[key] if key in holder else None  # noqa: SIM401
