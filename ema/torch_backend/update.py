"""The equation, and one update of many tensors by it.

    average + weight · (params − average)                    weight < 0.5
    params  − (params − average) · (1 − weight)              otherwise

This is what ``Tensor.lerp_`` computes, on the CPU with a fused multiply-add. The JAX backend has
the same function in the file of the same name, and it gives the same bits.

Sources: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging";
Ruppert 1988, "Efficient Estimations from a Slowly Convergent Robbins-Monro Process".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ema.torch_backend.memory import CHUNK, SERIAL, SMALL, flat, is_dense, real
from ema.torch_backend.steps import Step, run

__all__ = ["Update", "lerp"]


def lerp(averages: list[Tensor], params: list[Tensor], weight: float) -> Step | None:
    """The step that moves each average towards its params by ``weight``, in place.

    The equation is that of this module. Weight 0 leaves the averages and weight 1 copies the
    params, so that an infinity among them does not become NaN.

    Args:
        averages: real tensors of one dtype, contiguous.
        params: as many, of the same shapes, dtype and device.
        weight: ``1 − decay`` of this update, in [0, 1] and float64; rounded once, to the dtype of
            the averages.

    Returns:
        A call that does it, or None where there is nothing to do.
    """
    if averages[0].dtype == torch.float32:
        weight = float(np.float32(weight))
    if weight == 0.0:
        return None
    if weight == 1.0:
        return partial(torch._foreach_copy_, averages, params)
    return partial(torch._foreach_lerp_, averages, params, weight)


_Pair = tuple[tuple[Tensor, ...], Tensor]  # averages of one tensor, flat, and the tensor


class _Part(NamedTuple):
    """Params of one dtype once the loads are done, and the averages of each weight for them."""

    loads: tuple[Step, ...]
    averages: tuple[list[Tensor], ...]
    params: list[Tensor]


class Update:
    """One update of many averages, prepared once and run at every step.

    Large tensors whose average has the same dtype are read where they are, all in one call. The
    others pass through one buffer of :data:`~ema.torch_backend.memory.CHUNK` elements: small
    tensors whose averages lie side by side are gathered in it, and what has another dtype, device
    or memory order is converted in it, a chunk at a time. The buffer is reused, and a signal
    (Ctrl-C) finds an update done or not begun. Several averages of one tensor read it once.

    Args:
        averages: for each tensor its averages, dense and alike.
        params: the tensors, of the same shapes; they may have any strides, dtype and device.
    """

    def __init__(self, averages: Sequence[tuple[Tensor, ...]], params: Sequence[Tensor]) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._parts: list[_Part] = []
        large: list[_Pair] = []
        small: list[_Pair] = []
        for several, live in zip(averages, params, strict=True):
            first = several[0]
            if first.numel() == 0:
                continue
            if not is_dense(live) or live.stride() != first.stride():
                self._convert_rows(tuple(map(real, several)), real(live))
                continue
            pair = (tuple(map(flat, several)), flat(live))
            if first.numel() <= SMALL and first.device == live.device:
                small.append(pair)
            elif first.device == live.device and first.dtype == live.dtype:
                large.append(pair)
            else:
                self._convert_rows(*pair)
        for run_of_neighbors in _neighbors(small):
            self._gather(run_of_neighbors)
        self._read_in_place(large)

    def __call__(self, weights: Sequence[float]) -> None:
        """Run it with these weights, ``1 − decay`` in [0, 1] and float64, one for each average."""
        steps: list[Step] = []
        for loads, averages, params in self._parts:
            moves = [lerp(each, params, w) for each, w in zip(averages, weights, strict=True)]
            due = [move for move in moves if move is not None]
            steps += [*loads, *due] if due else []
        run(steps)

    def _read_in_place(self, pairs: list[_Pair]) -> None:
        """Average params without a copy: in one call, or for several averages while in cache."""
        by_dtype: dict[torch.dtype, list[_Pair]] = {}
        for pair in pairs:
            by_dtype.setdefault(pair[1].dtype, []).append(pair)
        for alike in by_dtype.values():
            several = [averages for averages, _ in alike]
            params = [live for _, live in alike]
            if len(several[0]) == 1:
                self._parts.append(_Part((), ([average for (average,) in several],), params))
                continue
            for averages, live in alike:
                chunks = zip(*(torch.split(average, CHUNK) for average in averages), strict=True)
                for targets, source in zip(chunks, torch.split(live, CHUNK), strict=True):
                    self._parts.append(_Part((), tuple([t] for t in targets), [source]))

    def _buffer(self, like: Tensor, dtype: torch.dtype, size: int) -> Tensor:
        """The first ``size`` elements of the one buffer of that dtype, on the device of ``like``."""
        key = (like.device, dtype)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(max(size, CHUNK), dtype=dtype, device=like.device)
        return self._buffers[key][:size]

    def _convert_rows(self, averages: tuple[Tensor, ...], live: Tensor) -> None:
        """Copy the params into the dtype, device and memory order of the averages."""
        if live.dim() == 0:
            averages, live = tuple(average.view(1) for average in averages), live.view(1)
        rows = len(live)
        if averages[0].is_contiguous():  # otherwise a slice of it need not be dense
            rows = max(1, CHUNK * rows // live.numel())
        chunks = zip(*(torch.split(average, rows) for average in averages), strict=True)
        for targets, source in zip(chunks, torch.split(live, rows), strict=True):
            like = targets[0]
            buffer = self._buffer(like, like.dtype, like.numel())
            buffer = buffer.as_strided(like.shape, like.stride())
            load = partial(buffer.copy_, source)
            self._parts.append(_Part((load,), tuple([t] for t in targets), [buffer]))

    def _gather(self, pairs: list[_Pair]) -> None:
        """Copy small params side by side, as their averages lie."""
        sources = [source for _, source in pairs]
        size = sum(source.numel() for source in sources)
        averages = [average.as_strided((size,), (1,)) for average in pairs[0][0]]
        like = averages[0]
        gathered = self._buffer(like, sources[0].dtype, size)
        loads: tuple[Step, ...] = (partial(torch.cat, sources, out=gathered),)
        if gathered.dtype != like.dtype:
            converted = self._buffer(like, like.dtype, size)
            loads += (partial(converted.copy_, gathered),)
            gathered = converted
        # pieces that stay on this thread: waiting for another core costs more than it saves
        pieces = tuple(list(torch.split(average, SERIAL)) for average in averages)
        self._parts.append(_Part(loads, pieces, list(torch.split(gathered, SERIAL))))


def _neighbors(pairs: list[_Pair]) -> Iterator[list[_Pair]]:
    """Runs of pairs whose averages lie side by side and whose params have one dtype."""
    together: list[_Pair] = []
    size = 0
    for averages, source in pairs:
        if together:
            lasts, like = together[-1]
            if (
                not all(map(_follows, averages, lasts))
                or source.dtype != like.dtype
                or size + source.numel() > CHUNK
            ):
                yield together
                together, size = [], 0
        together.append((averages, source))
        size += source.numel()
    if together:
        yield together


def _follows(average: Tensor, last: Tensor) -> bool:
    """Whether ``average`` begins where ``last`` ends."""
    same = average.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    return same and average.storage_offset() == last.storage_offset() + last.numel()
