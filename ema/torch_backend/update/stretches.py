"""The tensors of an update as stretches of memory, and which of them can be worked on together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ema.torch_backend.tensors.memory import CHUNK, NARROW_CHUNK, PLAIN, flat, real
from ema.torch_backend.tensors.tracked import Tracked
from ema.torch_backend.update.rounding import Indices, StretchBits

__all__ = ["Stretch", "neighbors"]


class Stretch(NamedTuple):
    """A tracked tensor, or a chunk of one, as real tensors.

    Attributes:
        averages: of the tensor.
        remainders: one for each average if these are compensated, else empty.
        live: the params.
        tracked: the tensor that this is, or is a chunk of.
    """

    averages: tuple[Tensor, ...]
    remainders: tuple[Tensor, ...]
    live: Tensor
    tracked: Tracked

    @classmethod
    def flat(cls, tracked: Tracked) -> Stretch:
        """All of a tensor as vectors; every tensor in it is dense and in one memory order."""
        return cls._of(tracked, flat)

    @classmethod
    def shaped(cls, tracked: Tracked) -> Stretch:
        """All of a tensor in its own shape."""
        return cls._of(tracked, real)

    @classmethod
    def _of(cls, tracked: Tracked, view: Callable[[Tensor], Tensor]) -> Stretch:
        averages, remainders = tracked.averages, tracked.remainders
        return cls(
            tuple(map(view, averages)), tuple(map(view, remainders)), view(tracked.live), tracked
        )

    @property
    def narrow(self) -> bool:
        """Whether the averages have fewer bits than they are computed in."""
        return self.averages[0].dtype == torch.bfloat16

    @property
    def computed(self) -> torch.dtype:
        """The dtype that the averages are computed in."""
        return torch.float32 if self.narrow else self.averages[0].dtype

    @property
    def source(self) -> Tensor:
        """The tensor to read: the live tensor itself if it is a plain vector, so that it may move."""
        live = self.tracked.live
        plain = type(live) in PLAIN and not live.is_complex()
        return live if plain and live.dim() == 1 else self.live

    @property
    def chunk(self) -> int:
        """Elements to work on at a time."""
        return NARROW_CHUNK if self.narrow else CHUNK

    @property
    def indices(self) -> Indices:
        """The indices of the whole tensor."""
        return Indices.of(self.tracked.averages[0], self.tracked.box)

    def random_bits(self) -> StretchBits | None:
        """The random bits of stochastic rounding; None if the average is not rounded stochastically."""
        if not self.narrow or self.tracked.stream is None:
            return None
        offset = self.averages[0].storage_offset() - self.tracked.averages[0].storage_offset()
        return StretchBits(self.tracked.stream, self.indices, int(offset))

    def chunks(self) -> Iterator[Stretch]:
        """Pieces that fit into a buffer; a tensor that is not contiguous stays whole."""
        kept, live = self.averages + self.remainders, self.live
        if live.dim() == 0:
            kept, live = tuple(each.view(1) for each in kept), live.view(1)
        rows = len(live)
        if kept[0].is_contiguous():  # otherwise a slice of it need not be dense
            rows = max(1, self.chunk * rows // live.numel())
        number = len(self.averages)
        pieces = zip(*(torch.split(each, rows) for each in kept), strict=True)
        for piece, source in zip(pieces, torch.split(live, rows), strict=True):
            yield Stretch(piece[:number], piece[number:], source, self.tracked)


def neighbors(stretches: list[Stretch]) -> Iterator[list[Stretch]]:
    """Groups of stretches whose averages lie side by side and whose params have one dtype."""
    together: list[Stretch] = []
    size = 0
    for stretch in stretches:
        if together and (
            not _follows(stretch, together[-1])
            or stretch.live.dtype != together[-1].live.dtype
            or size + stretch.live.numel() > stretch.chunk
        ):
            yield together
            together, size = [], 0
        together.append(stretch)
        size += stretch.live.numel()
    if together:
        yield together


def _follows(stretch: Stretch, last: Stretch) -> bool:
    """Whether the averages and remainders of ``stretch`` begin where those of ``last`` end."""
    return all(
        map(
            _begins_at_end,
            stretch.averages + stretch.remainders,
            last.averages + last.remainders,
        )
    )


def _begins_at_end(tensor: Tensor, last: Tensor) -> bool:
    same = tensor.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    return same and tensor.storage_offset() == last.storage_offset() + last.numel()
