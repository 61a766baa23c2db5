"""The ways in which an average comes into a parameter and the live values come back.

Each consists of :mod:`calls <ema.torch_backend.calls>` that can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ema.torch_backend.calls import Call, uninterrupted
from ema.torch_backend.gpu import kernels
from ema.torch_backend.tensors.memory import CHUNK, allocate, flat, is_dense

__all__ = [
    "Assignment",
    "Buffers",
    "Copying",
    "CopyingTogether",
    "Exchange",
    "ExchangeByKernel",
    "Move",
    "Repointing",
    "alike",
    "exchanges_on_accelerator",
    "many_at_once",
]

TOGETHER = 1 << 26
"""Elements that pass through a buffer at a time on an accelerator: 256 MiB of float32."""


class Move(Protocol):
    """One undoable move of an average into a parameter, or into a chunk of one.

    Attributes:
        into: steps that put the average in. The first one changes no value.
    """

    into: list[Call]

    def back(self) -> list[Call]:
        """Steps that put the live values back, once all of ``into`` were made."""


class Assignment:
    """The parameter refers to the memory of the average for as long as it is in: no byte moves.

    An average that is not :func:`alike`, or lies in an allocation with others, is copied.

    Args:
        tensor: the parameter.
        average: of its shape.

    Attributes:
        shown: the memory that it refers to meanwhile.
    """

    def __init__(self, tensor: Tensor, average: Tensor) -> None:
        self._tensor = tensor
        self._kept = tensor.detach()
        if alike(average, tensor) and average.untyped_storage().nbytes() == average.nbytes:
            self.shown = average
            first: Call = int  # does nothing
        else:
            self.shown = torch.empty_like(self._kept)
            first = partial(self.shown.copy_, average)
        self.into: list[Call] = [first, partial(setattr, tensor, "data", self.shown)]

    def back(self) -> list[Call]:
        if not any(map(self._tensor.is_set_to, (self.shown, self._kept))):
            return []  # moved or cast meanwhile, and stays where it is
        return [partial(setattr, self._tensor, "data", self._kept)]


class Exchange:
    """A chunk of the average and of the parameter change places through a buffer.

    Args:
        here: the chunk of the parameter.
        average: that of the average.
        buffer: at least as long; the next chunk may use it too.
    """

    def __init__(self, here: Tensor, average: Tensor, buffer: Tensor) -> None:
        kept = buffer[: here.numel()]
        self.into: list[Call] = [
            partial(kept.copy_, here),
            partial(here.copy_, average),
            partial(average.copy_, kept),
        ]

    def back(self) -> list[Call]:
        return self.into


class Copying:
    """The live values are kept aside, in their own dtype.

    Args:
        here: the memory of the parameter.
        average: of the same shape.

    Attributes:
        kept: the live values, during the swap.
    """

    def __init__(self, here: Tensor, average: Tensor) -> None:
        self._here = here
        self.kept = torch.empty_like(here)
        self.into: list[Call] = [partial(self.kept.copy_, here), partial(here.copy_, average)]

    def back(self) -> list[Call]:
        return [partial(self._here.copy_, self.kept)]


class CopyingTogether:
    """The same for many parameters in a launch each way, on an accelerator.

    Args:
        here: the memory of parameters, on one device.
        averages: of the same shapes.

    Attributes:
        kept: the live values, during the swap.
    """

    def __init__(self, here: list[Tensor], averages: list[Tensor]) -> None:
        self._here = here
        named = {str(index): tensor for index, tensor in enumerate(here)}
        kinds = {name: (tensor.device, tensor.dtype) for name, tensor in named.items()}
        self.kept = list(allocate(named, kinds).values())
        self.into: list[Call] = [
            partial(torch._foreach_copy_, self.kept, here),
            partial(torch._foreach_copy_, here, averages),
        ]

    def back(self) -> list[Call]:
        return [partial(torch._foreach_copy_, self._here, self.kept)]


class ExchangeTogether:
    """Many chunks change places through a buffer in three launches, on an accelerator.

    Args:
        here: chunks of parameters, flat and of one dtype.
        averages: those of the averages.
        buffer: at least as long as all of them; the next ones may use it too.
    """

    def __init__(self, here: list[Tensor], averages: list[Tensor], buffer: Tensor) -> None:
        size = sum(tensor.numel() for tensor in here)
        kept = list(torch.split(buffer[:size], [tensor.numel() for tensor in here]))
        self.into: list[Call] = [
            partial(torch._foreach_copy_, kept, here),
            partial(torch._foreach_copy_, here, averages),
            partial(torch._foreach_copy_, averages, kept),
        ]

    def back(self) -> list[Call]:
        return self.into


class ExchangeByKernel:
    """Parameters and averages of one device change places in one pass over their memory.

    Such a launch cannot be made again, but whether it was made is known: Ctrl-C waits for its end.

    Args:
        exchange: of the two.
    """

    def __init__(self, exchange: kernels.Exchange) -> None:
        self._exchange = exchange  # holds the memory, which parameters may leave meanwhile
        self._moved = False
        self._launches = [_Launch(launch) for launch in exchange.launches()]
        # int does nothing
        self.into: list[Call] = [int, *(launch.put_in for launch in self._launches)]

    def back(self) -> list[Call]:
        if (exchange := self._exchange.where_memory_is()) is not self._exchange:
            # the storages themselves were moved: share_memory() does it
            self._exchange = exchange
            self._launches = [_Launch(launch, is_in=True) for launch in exchange.launches()]
            self._moved = True
        return [launch.take_out for launch in self._launches]

    def is_ready(self) -> bool:
        """Whether the same steps can be made once more, after the live values are back."""
        return not self._moved and self._exchange.where_memory_is() is self._exchange


class _Launch:
    """A launch that exchanges, and whether it was made an odd number of times."""

    def __init__(self, launch: Callable[[], object], *, is_in: bool = False) -> None:
        self._launch = launch
        self._is_in = is_in

    def put_in(self) -> None:
        """Make it, unless it was made already."""
        self._flip(to=True)

    def take_out(self) -> None:
        """Undo it by making it again, unless it was undone already."""
        self._flip(to=False)

    def _flip(self, *, to: bool) -> None:
        with uninterrupted():
            if self._is_in is not to:
                self._launch()
                self._is_in = to


class Repointing:
    """Parameters refer to other memory of the same values for as long as a swap lasts.

    Args:
        places: a parameter, the memory that it refers to, and the one during the swap.
    """

    def __init__(self, places: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self._places = places
        self.into: list[Call] = [
            int,  # does nothing
            *(partial(setattr, tensor, "data", there) for tensor, _, there in places),
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters."""
        return [tensor for tensor, _, _ in self._places]

    def back(self) -> list[Call]:
        """Steps that give parameters their own memory again, unless they were moved meanwhile."""
        return [
            partial(setattr, tensor, "data", here)
            for tensor, here, there in self._places
            if tensor.is_set_to(there) or tensor.is_set_to(here)
        ]


class Buffers:
    """One for the exchanges of each device and dtype.

    Args:
        largest: elements of the largest tensor that is exchanged.
    """

    def __init__(self, largest: int) -> None:
        self._size = min(CHUNK, 2 * largest)  # a complex number is two reals
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def exchanges(self, here: Tensor, average: Tensor) -> Iterator[Exchange]:
        """The exchanges of all chunks of two tensors that are :func:`alike`."""
        theirs, ours = flat(here), flat(average)
        key = ours.device, ours.dtype
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self._size, dtype=ours.dtype, device=ours.device)
        for start in range(0, ours.numel(), CHUNK):
            chunk = slice(start, start + CHUNK)
            yield Exchange(theirs[chunk], ours[chunk], self._buffers[key])


def exchanges_on_accelerator(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[Move]:
    """Parts for parameters and averages of one device that are :func:`alike`, in few launches."""
    device = pairs[0][0].device
    if kernels.available(device):
        exchange = kernels.Exchange(*zip(*pairs, strict=True))
        if kernels.compiled(device, exchange):
            yield ExchangeByKernel(exchange)
            return
    alike: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for here, average in ((flat(here), flat(average)) for here, average in pairs):
        pairs_of_chunks = zip(
            torch.split(here, TOGETHER), torch.split(average, TOGETHER), strict=True
        )
        alike.setdefault(here.dtype, []).extend(pairs_of_chunks)
    for dtype, chunks in alike.items():
        groups = list(_of_bounded_size(chunks))
        longest = max(sum(here.numel() for here, _ in group) for group in groups)
        buffer = torch.empty(longest, dtype=dtype, device=device)
        for group in groups:
            theirs, ours = map(list, zip(*group, strict=True))
            yield ExchangeTogether(theirs, ours, buffer)


def _of_bounded_size(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Groups of at most :data:`TOGETHER` elements."""
    group: list[tuple[Tensor, Tensor]] = []
    size = 0
    for pair in pairs:
        if group and size + pair[0].numel() > TOGETHER:
            yield group
            group, size = [], 0
        group.append(pair)
        size += pair[0].numel()
    yield group


def many_at_once(device: torch.device) -> bool:
    """Whether launches cost more than a buffer: on every device other than a CPU."""
    return device.type != "cpu"


def alike(average: Tensor, here: Tensor) -> bool:
    """Whether the memory of both has the same form."""
    return (
        average.dtype == here.dtype
        and average.device == here.device
        and average.stride() == here.stride()
        and is_dense(here)
    )
