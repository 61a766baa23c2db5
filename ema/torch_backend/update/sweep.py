"""One update of many tensors, prepared once: how each of them passes through memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ema.torch_backend.calls import Call, run, uninterrupted
from ema.torch_backend.gpu import kernels
from ema.torch_backend.tensors.memory import (
    CHUNK,
    NARROW_CHUNK,
    SERIAL,
    SMALL,
    flat,
    is_dense,
)
from ema.torch_backend.tensors.tracked import Tracked
from ema.torch_backend.update.equation import compensated, lerp, narrow
from ema.torch_backend.update.rounding import GatheredBits, RandomBits, Scratch
from ema.torch_backend.update.stretches import Stretch, neighbors

__all__ = ["Sweep"]


class _Pass(NamedTuple):
    """Memory that is updated together.

    Attributes:
        loads: calls that bring the params into ``params``.
        averages: for each average, its tensors.
        remainders: for each average, its remainder; empty if it has none.
        params: in the dtype of the computation, once the loads are done.
        bits: random bits for stochastic rounding.
    """

    loads: tuple[Call, ...]
    averages: Sequence[list[Tensor]]
    remainders: Sequence[Tensor]
    params: list[Tensor]
    bits: RandomBits | None


class Sweep:
    """One update of many averages, prepared once and run at every step.

    Large tensors whose average has the same dtype are read where they are, all in one call. The
    others pass through one buffer of :data:`~ema.torch_backend.tensors.memory.CHUNK` elements: small
    tensors whose averages lie side by side are gathered in it, and tensors of another dtype, device
    or memory order are converted in it, a chunk at a time. A copy that needs more than one operation is
    done a chunk at a time too, so that it stays in cache. The buffers are reused, and a signal
    (Ctrl-C) finds an update done or not begun. Several averages of one tensor read it once.

    On a GPU, kernels do in one pass what PyTorch would do in several.

    Args:
        tracked: the tensors and their averages, all of one number.
        guarded: whether a flag on the device decides if an update is made, as far as
            :attr:`on_device` allows.

    Attributes:
        on_device: whether kernels do all of it.
        read: ids of live tensors that are read through themselves, wherever their memory is by
            then.
    """

    def __init__(self, tracked: Sequence[Tracked], *, guarded: bool = False) -> None:
        self._number = max((len(each.averages) for each in tracked), default=0)
        self._guarded = guarded
        self._buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._scratch: dict[torch.device, Scratch] = {}
        self._passes: list[_Pass] = []
        self.read: set[int] = set()
        stretches: list[Stretch] = []
        for each in tracked:
            average, live = each.averages[0], each.live
            if average.numel() == 0:
                continue
            if is_dense(live) and live.stride() == average.stride():
                stretches.append(Stretch.flat(each))
            else:
                self._convert_rows(Stretch.shaped(each))
        self._kernels: list[list[kernels.Fused]] = [[] for _ in range(self._number)]
        small: list[Stretch] = []
        large: list[Stretch] = []
        for stretch in self._without_kernel(stretches):
            average, live = stretch.averages[0], stretch.live
            here = average.device == live.device
            if here and average.numel() <= SMALL and _in_order(stretch):
                small.append(stretch)
            elif here and live.dtype == stretch.computed:
                large.append(stretch)
            else:
                self._convert_rows(stretch)
        for together in neighbors(small):
            self._gather(together)
        self._read_in_place(large)
        self.on_device = any(self._kernels) and not self._passes

    @property
    def tensors(self) -> list[Tensor]:
        """Allocate scratch, and prepare the kernels."""
        used = [tensor for several in self._kernels for each in several for tensor in each.tensors]
        used += self._buffers.values()
        return used + [tensor for scratch in self._scratch.values() for tensor in scratch]

    def __call__(
        self,
        weights: Sequence[float],
        count: int,
        finite: Mapping[torch.device, Tensor] | None = None,
        *,
        then: Call = int,
    ) -> None:
        """Run it.

        Args:
            weights: ``1 − decay`` in [0, 1] and float64, one for each average.
            count: number of the update, from 1.
            finite: if kernels do everything, a bool on each device, all of the same value; false:
                nothing is done.
            then: a last step, which a signal cannot part from the others.
        """
        steps = [*self._steps(weights, count), then]
        if not any(self._kernels):
            # live tensors are read too: without autograd each of them takes 40 ns less
            with torch.inference_mode():
                run(steps)
            return
        with uninterrupted(), torch.no_grad():
            for weight, several in zip(weights, self._kernels, strict=True):
                for kernel in several:
                    kernel(weight, count, None if finite is None else finite[kernel.device])
            run(steps)

    def _steps(self, weights: Sequence[float], count: int) -> Iterator[Call]:
        """The steps that no kernel does."""
        single = [float(np.float32(weight)) for weight in weights]  # rounded once
        for each in self._passes:
            wide = each.params[0].dtype == torch.float64
            moves: list[Call] = []
            for index, weight in enumerate(weights if wide else single):
                moves += self._moves(each, index, weight, count)
            if moves:
                yield from each.loads
                yield from moves

    def _moves(self, step: _Pass, index: int, weight: float, count: int) -> list[Call]:
        """The calls that update one average in one pass."""
        averages, params = step.averages[index], step.params
        if averages[0].dtype == torch.bfloat16:
            (average,), (source,) = averages, params
            scratch = self._scratch[average.device].first(average.numel())
            return narrow(average, source, weight, count=count, bits=step.bits, scratch=scratch)
        if not step.remainders:
            return lerp(averages, params, weight)
        (average,), remainder, (source,) = averages, step.remainders[index], params
        y, total = (self._buffer(average, average.dtype, index) for index in (1, 2))
        return compensated(average, remainder, source, weight, (y, total))

    def _without_kernel(self, stretches: list[Stretch]) -> list[Stretch]:
        """Prepare kernels for all stretches that have one; return the other stretches."""
        together: dict[torch.device, list[Stretch]] = {}
        for stretch in stretches:
            if _has_kernel(stretch):
                together.setdefault(stretch.live.device, []).append(stretch)
        done: set[int] = set()
        for device, here in together.items():
            prepared = [list(self._fuse(here, index)) for index in range(self._number)]
            if kernels.compiled(device, *chain.from_iterable(prepared)):
                done.update(map(id, here))
                for several, more in zip(self._kernels, prepared, strict=True):
                    several.extend(more)
        return [stretch for stretch in stretches if id(stretch) not in done]

    def _fuse(self, stretches: list[Stretch], index: int) -> Iterator[kernels.Fused]:
        """The kernels of one average on one device."""
        alike: dict[torch.dtype, list[Stretch]] = {}
        for stretch in stretches:
            alike.setdefault(stretch.averages[0].dtype, []).append(stretch)
        for group in alike.values():
            bits = [each for each in map(Stretch.random_bits, group) if each is not None]
            compensated = bool(group[0].remainders)
            yield kernels.Fused(
                [stretch.averages[index] for stretch in group],
                [stretch.live for stretch in group],
                [stretch.remainders[index] for stretch in group] if compensated else None,
                [each.stream for each in bits] if bits else None,
                [each.indices.offset for each in bits] if bits else None,
                guarded=self._guarded,
            )

    def _read_in_place(self, stretches: list[Stretch]) -> None:
        """Average params without a copy: in one call, or a chunk at a time while it is in cache."""
        together: dict[tuple[torch.device, torch.dtype], list[Stretch]] = {}
        for stretch in stretches:
            alone = len(stretch.averages) == 1 and not stretch.remainders
            if alone and not stretch.narrow:
                kind = stretch.live.device, stretch.live.dtype
                together.setdefault(kind, []).append(stretch)
                continue
            for chunk in stretch.chunks():
                self._add((), chunk, chunk.live, chunk.random_bits())
        for alike in together.values():
            averages = [average for stretch in alike for average in stretch.averages]
            self._passes.append(_Pass((), (averages,), (), [each.live for each in alike], None))

    def _convert_rows(self, stretch: Stretch) -> None:
        """Copy the params into the dtype, device and memory order of the averages."""
        for chunk in stretch.chunks():
            like = chunk.averages[0]
            buffer = self._buffer(like, chunk.computed)
            load = partial(buffer.as_strided(like.shape, like.stride()).copy_, chunk.live)
            self._add((load,), chunk, buffer, chunk.random_bits())

    def _gather(self, stretches: list[Stretch]) -> None:
        """Copy small params side by side, as their averages lie."""
        sources = [stretch.source for stretch in stretches]
        self.read.update(id(each.source) for each in stretches if each.source is each.tracked.live)
        size = sum(source.numel() for source in sources)
        first = stretches[0]._replace(
            averages=tuple(each.as_strided((size,), (1,)) for each in stretches[0].averages),
            remainders=tuple(each.as_strided((size,), (1,)) for each in stretches[0].remainders),
        )
        like = first.averages[0]
        gathered = self._buffer(like, sources[0].dtype)
        loads = tuple(_side_by_side(sources, gathered))
        if gathered.dtype != first.computed:
            converted = self._buffer(like, first.computed)
            loads += (partial(converted.copy_, gathered),)
            gathered = converted
        bits = [each for each in map(Stretch.random_bits, stretches) if each is not None]
        if bits:
            self._add(loads, first, gathered, GatheredBits(bits, like.device))
        elif first.remainders or first.narrow:
            self._add(loads, first, gathered, None)
        else:
            # pieces that stay on this thread: waiting for another core costs more than it saves
            pieces = [list(torch.split(average, SERIAL)) for average in first.averages]
            self._passes.append(_Pass(loads, pieces, (), list(torch.split(gathered, SERIAL)), None))

    def _add(
        self,
        loads: tuple[Call, ...],
        chunk: Stretch,
        params: Tensor,
        bits: RandomBits | None,
    ) -> None:
        """One chunk, with the scratch that it needs."""
        averages = [flat(average) for average in chunk.averages]
        remainders = [flat(remainder) for remainder in chunk.remainders]
        like = averages[0]
        if like.dtype == torch.bfloat16:
            scratch = self._scratch.get(like.device)
            if scratch is None or len(scratch.bits) < len(like):
                size = max(len(like), NARROW_CHUNK)
                self._scratch[like.device] = Scratch.allocate(size, like.device)
        elif remainders:
            for index in (1, 2):
                self._buffer(like, like.dtype, index)
        self._passes.append(
            _Pass(loads, [[average] for average in averages], remainders, [params], bits)
        )

    def _buffer(self, like: Tensor, dtype: torch.dtype, index: int = 0) -> Tensor:
        """As many elements as ``like`` has of a buffer of that dtype, on its device."""
        key, size = (like.device, dtype, index), like.numel()
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(max(size, CHUNK), dtype=dtype, device=like.device)
        return self._buffers[key][:size]


def _in_order(stretch: Stretch) -> bool:
    """Whether its random bits, if any, follow the order of its memory."""
    return stretch.random_bits() is None or stretch.indices.consecutive


def _has_kernel(stretch: Stretch) -> bool:
    """Whether a kernel can do it."""
    average, live = stretch.averages[0], stretch.live
    return (
        average.device == live.device
        and kernels.supports(average.dtype, live.dtype)
        and kernels.available(average.device)
        and _in_order(stretch)
    )


def _side_by_side(sources: list[Tensor], out: Tensor) -> Iterator[Call]:
    """Copy vectors one after the other into ``out``.

    On a CPU it copies a piece at a time, small enough to stay on this thread: for larger ones
    ``torch.cat`` takes up to five times as long for each element.
    """
    first = start = stop = 0
    for last, source in enumerate(sources):
        if out.device.type == "cpu" and stop + source.numel() - start >= SERIAL:
            yield partial(torch.cat, sources[first:last], out=out[start:stop])
            first, start = last, stop
        stop += source.numel()
    yield partial(torch.cat, sources[first:], out=out[start:])
