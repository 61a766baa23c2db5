"""The ways in which an average comes into a parameter and the live values come back.

Each is made of :mod:`steps <ema.torch_backend.steps>`, every one of which can be made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ema.torch_backend.memory import CHUNK, flat, is_dense
from ema.torch_backend.steps import Step

__all__ = ["Assignment", "Buffers", "Copying", "Exchange", "Part", "Repointing", "alike"]


class Part(Protocol):
    """A parameter, or a chunk of one, on its way.

    Attributes:
        into: steps that put the average in. As long as no step after the first one was taken, all
            is as it was.
    """

    into: list[Step]

    def back(self) -> list[Step]:
        """Steps that put the live values back, once all of ``into`` were made."""


class Assignment:
    """The parameter refers to the memory of the average for as long as it is in: no byte moves.

    An average that is not :func:`alike`, or lies in an allocation with others, is copied.

    Args:
        tensor: the parameter.
        average: of its shape.

    Attributes:
        shown: the memory that it refers to for the time.
    """

    def __init__(self, tensor: Tensor, average: Tensor) -> None:
        self._tensor = tensor
        self._kept = tensor.detach()
        if alike(average, tensor) and average.untyped_storage().nbytes() == average.nbytes:
            self.shown = average
            first: Step = int  # does nothing
        else:
            self.shown = torch.empty_like(self._kept)
            first = partial(self.shown.copy_, average)
        self.into: list[Step] = [first, partial(setattr, tensor, "data", self.shown)]

    def back(self) -> list[Step]:
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
        self.into: list[Step] = [
            partial(kept.copy_, here),
            partial(here.copy_, average),
            partial(average.copy_, kept),
        ]

    def back(self) -> list[Step]:
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
        self.into: list[Step] = [partial(self.kept.copy_, here), partial(here.copy_, average)]

    def back(self) -> list[Step]:
        return [partial(self._here.copy_, self.kept)]


class Repointing:
    """Parameters refer to other memory of the same values for as long as a swap lasts.

    Args:
        places: a parameter, the memory that it refers to, and the one during the swap.
    """

    def __init__(self, places: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        self._places = places
        self.into: list[Step] = [
            int,  # does nothing
            *(partial(setattr, tensor, "data", there) for tensor, _, there in places),
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters."""
        return [tensor for tensor, _, _ in self._places]

    def back(self) -> list[Step]:
        """Steps that put back what the parameters referred to, unless they were moved meanwhile."""
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
        """Those of all chunks of two tensors that are :func:`alike`."""
        theirs, ours = flat(here), flat(average)
        key = ours.device, ours.dtype
        if key not in self._buffers:
            self._buffers[key] = torch.empty(self._size, dtype=ours.dtype, device=ours.device)
        for start in range(0, ours.numel(), CHUNK):
            chunk = slice(start, start + CHUNK)
            yield Exchange(theirs[chunk], ours[chunk], self._buffers[key])


def alike(average: Tensor, here: Tensor) -> bool:
    """Whether the memory of the one has the form of the other's."""
    return (
        average.dtype == here.dtype
        and average.device == here.device
        and average.stride() == here.stride()
        and is_dense(here)
    )
