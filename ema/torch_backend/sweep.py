"""One update of many tensors: the way of each of them through memory, prepared once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ema.rounding import Stream
from ema.torch_backend import kernels
from ema.torch_backend.interrupts import uninterrupted
from ema.torch_backend.memory import CHUNK, NARROW_CHUNK, SERIAL, SMALL, flat, is_dense, real
from ema.torch_backend.rounding import Counters, Gathered, Indices, Run, Scratch
from ema.torch_backend.sharding import Place
from ema.torch_backend.steps import Step, run
from ema.torch_backend.update import compensated, lerp, narrow

__all__ = ["Entry", "Sweep"]


class Entry(NamedTuple):
    """What an update needs to know of one tensor.

    Attributes:
        slots: its averages and, where they are compensated, as many remainders after them; dense
            and alike.
        live: the tensor, of the same shape; it may have any strides, dtype and device.
        place: where in a whole tensor it lies.
        stream: of its random bits; None rounds to nearest.
    """

    slots: tuple[Tensor, ...]
    live: Tensor
    place: Place
    stream: Stream | None


class _Stretch(NamedTuple):
    """Slots and params of an entry, or a chunk of them, as real tensors."""

    slots: tuple[Tensor, ...]
    live: Tensor
    entry: Entry

    @property
    def narrow(self) -> bool:
        """Whether the averages are of fewer bits than they are computed in."""
        return self.slots[0].dtype == torch.bfloat16

    @property
    def indices(self) -> Indices:
        """Of the whole entry."""
        return Indices.of(self.entry.slots[0], self.entry.place)

    def counters(self) -> Run | None:
        """Those of the random bits, where there are any."""
        if not self.narrow or self.entry.stream is None:
            return None
        start = int(self.slots[0].storage_offset() - self.entry.slots[0].storage_offset())
        return Run(self.entry.stream, self.indices, start)

    def chunks(self) -> Iterator[_Stretch]:
        """Pieces that fit into a buffer; what is not contiguous stays whole."""
        slots, live = self.slots, self.live
        if live.dim() == 0:
            slots, live = tuple(slot.view(1) for slot in slots), live.view(1)
        rows = len(live)
        if slots[0].is_contiguous():  # otherwise a slice of it need not be dense
            rows = max(1, (NARROW_CHUNK if self.narrow else CHUNK) * rows // live.numel())
        parts = zip(*(torch.split(slot, rows) for slot in slots), strict=True)
        for those, source in zip(parts, torch.split(live, rows), strict=True):
            yield _Stretch(those, source, self.entry)


class _Part(NamedTuple):
    """Params once the loads are done, in the dtype of the computation, and the slots for them."""

    loads: tuple[Step, ...]
    slots: tuple[list[Tensor], ...]
    params: list[Tensor]
    counters: Counters | None


class Sweep:
    """One update of many averages, prepared once and run at every step.

    Large tensors whose average has the same dtype are read where they are, all in one call. The
    others pass through one buffer of :data:`~ema.torch_backend.memory.CHUNK` elements: small
    tensors whose averages lie side by side are gathered in it, and what has another dtype, device
    or memory order is converted in it, a chunk at a time. What needs more than one operation is
    done a chunk at a time too, so that it stays in cache. The buffers are reused, and a signal
    (Ctrl-C) finds an update done or not begun. Several averages of one tensor read it once.

    On a GPU kernels take what PyTorch would need several passes for.

    Args:
        entries: the tensors and their averages.
        number: averages of each tensor.
        guarded: whether calls say by a flag on the device if anything is to be done, as far as
            :attr:`on_device` allows.

    Attributes:
        on_device: whether kernels do all of it.
        read: ids of live tensors that are read through themselves, wherever their memory is by
            then.
    """

    def __init__(self, entries: Sequence[Entry], number: int, *, guarded: bool = False) -> None:
        self._number = number
        self._guarded = guarded
        self._buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._scratch: dict[torch.device, Scratch] = {}
        self._parts: list[_Part] = []
        self.read: set[int] = set()
        fused: list[_Stretch] = []
        large: list[_Stretch] = []
        small: list[_Stretch] = []
        for entry in entries:
            first, live = entry.slots[0], entry.live
            if first.numel() == 0:
                continue
            if not is_dense(live) or live.stride() != first.stride():
                self._convert_rows(_Stretch(tuple(map(real, entry.slots)), real(live), entry))
                continue
            stretch = _Stretch(tuple(map(flat, entry.slots)), flat(live), entry)
            here = first.device == live.device
            in_order = stretch.counters() is None or stretch.indices.consecutive
            if here and in_order and self._has_kernel(stretch):
                fused.append(stretch)
            elif here and in_order and first.numel() <= SMALL:
                small.append(stretch)
            elif here and live.dtype == _computed(first):
                large.append(stretch)
            else:
                self._convert_rows(stretch)
        self._kernels = [list(self._fuse(fused, index)) for index in range(number)]
        for neighbors in _neighbors(small):
            self._gather(neighbors)
        self._read_in_place(large)
        self.on_device = bool(fused) and not self._parts

    @property
    def tensors(self) -> list[Tensor]:
        """Memory of its own, and what kernels work on."""
        used = [tensor for several in self._kernels for each in several for tensor in each.tensors]
        used += self._buffers.values()
        return used + [tensor for scratch in self._scratch.values() for tensor in scratch]

    def __call__(self, weights: Sequence[float], count: int, finite: Tensor | None = None) -> None:
        """Run it.

        Args:
            weights: ``1 − decay`` in [0, 1] and float64, one for each average.
            count: number of the update, from 1.
            finite: where it is all on the device, a bool there; false: nothing is done.
        """
        steps = list(self._steps(weights, count))
        if not any(self._kernels):
            with torch.no_grad():  # live tensors are among what is read
                run(steps)
            return
        with uninterrupted(), torch.no_grad():
            for weight, several in zip(weights, self._kernels, strict=True):
                for kernel in several:
                    kernel(weight, count, finite)
            run(steps)

    def _steps(self, weights: Sequence[float], count: int) -> Iterator[Step]:
        """All that is not done by kernels."""
        single = [float(np.float32(weight)) for weight in weights]  # rounded once
        for part in self._parts:
            wide = part.params[0].dtype == torch.float64
            moves: list[Step] = []
            for index, weight in enumerate(weights if wide else single):
                moves += self._moves(part, index, weight, count)
            if moves:
                yield from part.loads
                yield from moves

    def _moves(self, part: _Part, index: int, weight: float, count: int) -> list[Step]:
        """The steps of one average in one part."""
        averages, params = part.slots[index], part.params
        remainders = part.slots[index + self._number] if len(part.slots) > self._number else None
        if averages[0].dtype == torch.bfloat16:
            (average,), (source,) = averages, params
            scratch = self._scratch[average.device].first(average.numel())
            return narrow(
                average, source, weight, count=count, counters=part.counters, scratch=scratch
            )
        if remainders is None:
            return lerp(averages, params, weight)
        (average,), (remainder,), (source,) = averages, remainders, params
        y, total = (self._buffer(average, average.dtype, index) for index in (1, 2))
        return compensated(average, remainder, source, weight, (y, total))

    def _has_kernel(self, stretch: _Stretch) -> bool:
        """Whether a kernel does it, and better than PyTorch's own operators."""
        average, live = stretch.slots[0], stretch.live
        plain = average.dtype == live.dtype == torch.float32 and len(stretch.slots) == self._number
        return (
            (self._guarded or not plain)
            and kernels.supports(average.dtype, live.dtype)
            and kernels.available(average.device)
        )

    def _fuse(self, stretches: list[_Stretch], index: int) -> Iterator[kernels.Fused]:
        """The kernels of one average."""
        alike: dict[tuple[torch.device, torch.dtype], list[_Stretch]] = {}
        for stretch in stretches:
            first = stretch.slots[0]
            alike.setdefault((first.device, first.dtype), []).append(stretch)
        for group in alike.values():
            runs = [run for run in map(_Stretch.counters, group) if run is not None]
            compensated = len(group[0].slots) > self._number
            yield kernels.Fused(
                [stretch.slots[index] for stretch in group],
                [stretch.live for stretch in group],
                [stretch.slots[self._number + index] for stretch in group] if compensated else None,
                [run.stream for run in runs] if runs else None,
                [run.indices.offset for run in runs] if runs else None,
            )

    def _read_in_place(self, stretches: list[_Stretch]) -> None:
        """Average params without a copy: in one call, or a chunk at a time while it is in cache."""
        together: dict[torch.dtype, list[_Stretch]] = {}
        for stretch in stretches:
            if len(stretch.slots) == 1 and not stretch.narrow:
                together.setdefault(stretch.live.dtype, []).append(stretch)
                continue
            for chunk in stretch.chunks():
                self._add((), chunk.slots, chunk.live, chunk.counters())
        for alike in together.values():
            averages = [average for stretch in alike for average in stretch.slots]
            self._parts.append(_Part((), (averages,), [each.live for each in alike], None))

    def _convert_rows(self, stretch: _Stretch) -> None:
        """Copy the params into the dtype, device and memory order of the averages."""
        for chunk in stretch.chunks():
            like = chunk.slots[0]
            buffer = self._buffer(like, _computed(like))
            load = partial(buffer.as_strided(like.shape, like.stride()).copy_, chunk.live)
            self._add((load,), tuple(map(flat, chunk.slots)), buffer, chunk.counters())

    def _gather(self, stretches: list[_Stretch]) -> None:
        """Copy small params side by side, as their averages lie."""
        sources = [_readable(stretch) for stretch in stretches]
        self.read.update(
            id(each.entry.live) for each in stretches if _readable(each) is each.entry.live
        )
        size = sum(source.numel() for source in sources)
        slots = tuple(slot.as_strided((size,), (1,)) for slot in stretches[0].slots)
        like = slots[0]
        gathered = self._buffer(like, sources[0].dtype)
        if len({source.numel() for source in sources}) == 1:  # three times as fast
            rows = gathered.view(len(sources), -1)
            loads: tuple[Step, ...] = (partial(torch.stack, sources, out=rows),)
        else:
            loads = (partial(torch.cat, sources, out=gathered),)
        if gathered.dtype != _computed(like):
            converted = self._buffer(like, _computed(like))
            loads += (partial(converted.copy_, gathered),)
            gathered = converted
        counted = [each for each in map(_Stretch.counters, stretches) if each is not None]
        if counted:
            self._add(loads, slots, gathered, Gathered(counted, like.device))
        elif len(slots) > self._number or stretches[0].narrow:
            self._add(loads, slots, gathered, None)
        else:
            # pieces that stay on this thread: waiting for another core costs more than it saves
            pieces = tuple(list(torch.split(slot, SERIAL)) for slot in slots)
            self._parts.append(_Part(loads, pieces, list(torch.split(gathered, SERIAL)), None))

    def _add(
        self,
        loads: tuple[Step, ...],
        slots: tuple[Tensor, ...],
        params: Tensor,
        counters: Counters | None,
    ) -> None:
        """One chunk, with the scratch that it needs."""
        like = slots[0]
        if like.dtype == torch.bfloat16:
            scratch = self._scratch.get(like.device)
            if scratch is None or len(scratch.bits) < len(like):
                size = max(len(like), NARROW_CHUNK)
                self._scratch[like.device] = Scratch.allocate(size, like.device)
        elif len(slots) > self._number:
            for index in (1, 2):
                self._buffer(like, like.dtype, index)
        self._parts.append(_Part(loads, tuple([slot] for slot in slots), [params], counters))

    def _buffer(self, like: Tensor, dtype: torch.dtype, index: int = 0) -> Tensor:
        """As many elements as ``like`` has of a buffer of that dtype, on its device."""
        key, size = (like.device, dtype, index), like.numel()
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(max(size, CHUNK), dtype=dtype, device=like.device)
        return self._buffers[key][:size]


def _computed(average: Tensor) -> torch.dtype:
    """The dtype that an average is computed in."""
    return torch.float32 if average.dtype == torch.bfloat16 else average.dtype


def _readable(stretch: _Stretch) -> Tensor:
    """The live tensor itself where that is a plain vector, so that it may move; else its memory."""
    live = stretch.entry.live
    plain = type(live) in {Tensor, nn.Parameter, nn.Buffer} and not live.is_complex()
    return live if plain and live.dim() == 1 else stretch.live


def _neighbors(stretches: list[_Stretch]) -> Iterator[list[_Stretch]]:
    """Runs of stretches whose slots lie side by side and whose params have one dtype."""
    together: list[_Stretch] = []
    size = 0
    for stretch in stretches:
        if together and (
            not all(map(_follows, stretch.slots, together[-1].slots))
            or stretch.live.dtype != together[-1].live.dtype
            or size + stretch.live.numel() > (NARROW_CHUNK if stretch.narrow else CHUNK)
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
