"""The tensors of an update as stretches of memory, and which of them can be worked on together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ema.rounding import Stream
from ema.torch_backend.tensors.memory import CHUNK, NARROW_CHUNK, PLAIN
from ema.torch_backend.tensors.sharding import Box
from ema.torch_backend.update.rounding import Indices, StretchBits

__all__ = ["Entry", "Stretch", "neighbors"]


class Entry(NamedTuple):
    """What an update needs to know of one tensor.

    Attributes:
        slots: its averages and, where they are compensated, as many remainders after them; dense
            and alike.
        live: the tensor, of the same shape; it may have any strides, dtype and device.
        box: where in a whole tensor it lies.
        stream: of its random bits; None rounds to nearest.
    """

    slots: tuple[Tensor, ...]
    live: Tensor
    box: Box
    stream: Stream | None


class Stretch(NamedTuple):
    """Slots and params of an entry, or a chunk of them, as real tensors."""

    slots: tuple[Tensor, ...]
    live: Tensor
    entry: Entry

    @property
    def narrow(self) -> bool:
        """Whether the averages are of fewer bits than they are computed in."""
        return self.slots[0].dtype == torch.bfloat16

    @property
    def computed(self) -> torch.dtype:
        """The dtype that the averages are computed in."""
        return torch.float32 if self.narrow else self.slots[0].dtype

    @property
    def source(self) -> Tensor:
        """What to read: the live tensor itself where that is a plain vector, so that it may move."""
        live = self.entry.live
        plain = type(live) in PLAIN and not live.is_complex()
        return live if plain and live.dim() == 1 else self.live

    @property
    def chunk(self) -> int:
        """Elements to work on at a time."""
        return NARROW_CHUNK if self.narrow else CHUNK

    @property
    def indices(self) -> Indices:
        """Of the whole entry."""
        return Indices.of(self.entry.slots[0], self.entry.box)

    def random_bits(self) -> StretchBits | None:
        """Those of the random bits, where there are any."""
        if not self.narrow or self.entry.stream is None:
            return None
        start = int(self.slots[0].storage_offset() - self.entry.slots[0].storage_offset())
        return StretchBits(self.entry.stream, self.indices, start)

    def chunks(self) -> Iterator[Stretch]:
        """Pieces that fit into a buffer; what is not contiguous stays whole."""
        slots, live = self.slots, self.live
        if live.dim() == 0:
            slots, live = tuple(slot.view(1) for slot in slots), live.view(1)
        rows = len(live)
        if slots[0].is_contiguous():  # otherwise a slice of it need not be dense
            rows = max(1, self.chunk * rows // live.numel())
        parts = zip(*(torch.split(slot, rows) for slot in slots), strict=True)
        for those, source in zip(parts, torch.split(live, rows), strict=True):
            yield Stretch(those, source, self.entry)


def neighbors(stretches: list[Stretch]) -> Iterator[list[Stretch]]:
    """Runs of stretches whose slots lie side by side and whose params have one dtype."""
    together: list[Stretch] = []
    size = 0
    for stretch in stretches:
        if together and (
            not all(map(_follows, stretch.slots, together[-1].slots))
            or stretch.live.dtype != together[-1].live.dtype
            or size + stretch.live.numel() > stretch.chunk
        ):
            yield together
            together, size = [], 0
        together.append(stretch)
        size += stretch.live.numel()
    if together:
        yield together


def _follows(average: Tensor, last: Tensor) -> bool:
    """Whether ``average`` begins where ``last`` ends."""
    same = average.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    return same and average.storage_offset() == last.storage_offset() + last.numel()
