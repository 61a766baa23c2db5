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


class _Part(NamedTuple):
    """Averages of one dtype, and the params for them once the loads are done."""

    loads: tuple[Step, ...]
    averages: list[Tensor]
    params: list[Tensor]


class Update:
    """One update of many averages, prepared once and run at every step.

    Large tensors whose average has the same dtype are read where they are, all in one call. The
    others pass through one buffer of :data:`~ema.torch_backend.memory.CHUNK` elements: small
    tensors whose averages lie side by side are gathered in it, and what has another dtype, device
    or memory order is converted in it, a chunk at a time. The buffer is reused, and a signal
    (Ctrl-C) finds an update done or not begun.

    Args:
        averages: dense tensors.
        params: as many, of the same shapes; they may have any strides, dtype and device.
    """

    def __init__(self, averages: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._parts: list[_Part] = []
        large: dict[torch.dtype, _Part] = {}
        small: list[tuple[Tensor, Tensor]] = []
        for average, live in zip(averages, params, strict=True):
            if average.numel() == 0:
                continue
            if not is_dense(live) or live.stride() != average.stride():
                self._convert_rows(real(average), real(live))
            elif average.device != live.device or average.dtype != live.dtype:
                if average.numel() <= SMALL and average.device == live.device:
                    small.append((flat(average), flat(live)))
                else:
                    self._convert_rows(flat(average), flat(live))
            elif average.numel() <= SMALL:
                small.append((flat(average), flat(live)))
            else:
                part = large.setdefault(average.dtype, _Part((), [], []))
                part.averages.append(flat(average))
                part.params.append(flat(live))
        for run_of_neighbors in _neighbors(small):
            self._gather(run_of_neighbors)
        self._parts += large.values()

    def __call__(self, weight: float) -> None:
        """Run it with this weight, ``1 − decay`` in [0, 1] and float64."""
        steps: list[Step] = []
        for part in self._parts:
            if (step := lerp(part.averages, part.params, weight)) is not None:
                steps += [*part.loads, step]
        run(steps)

    def _buffer(self, like: Tensor, dtype: torch.dtype, size: int) -> Tensor:
        """The first ``size`` elements of the one buffer of that dtype, on the device of ``like``."""
        key = (like.device, dtype)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(max(size, CHUNK), dtype=dtype, device=like.device)
        return self._buffers[key][:size]

    def _convert_rows(self, average: Tensor, live: Tensor) -> None:
        """Copy the params into the dtype, device and memory order of the average."""
        if average.dim() == 0:
            average, live = average.view(1), live.view(1)
        rows = len(average)
        if average.is_contiguous():  # otherwise a slice of it need not be dense
            rows = max(1, CHUNK * rows // average.numel())
        for target, source in zip(torch.split(average, rows), torch.split(live, rows), strict=True):
            buffer = self._buffer(target, target.dtype, target.numel())
            buffer = buffer.as_strided(target.shape, target.stride())
            self._parts.append(_Part((partial(buffer.copy_, source),), [target], [buffer]))

    def _gather(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Copy small params side by side, as their averages lie."""
        sources = [source for _, source in pairs]
        size = sum(source.numel() for source in sources)
        average = pairs[0][0].as_strided((size,), (1,))
        gathered = self._buffer(average, sources[0].dtype, size)
        loads: tuple[Step, ...] = (partial(torch.cat, sources, out=gathered),)
        if gathered.dtype != average.dtype:
            converted = self._buffer(average, average.dtype, size)
            loads += (partial(converted.copy_, gathered),)
            gathered = converted
        # pieces that stay on this thread: waiting for another core costs more than it saves
        self._parts.append(
            _Part(loads, list(torch.split(average, SERIAL)), list(torch.split(gathered, SERIAL)))
        )


def _neighbors(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Runs of pairs whose averages lie side by side and whose params have one dtype."""
    run_of_neighbors: list[tuple[Tensor, Tensor]] = []
    size = 0
    for average, source in pairs:
        if run_of_neighbors:
            last, like = run_of_neighbors[-1]
            follows = (
                average.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
                and average.storage_offset() == last.storage_offset() + last.numel()
            )
            if not follows or source.dtype != like.dtype or size + average.numel() > CHUNK:
                yield run_of_neighbors
                run_of_neighbors, size = [], 0
        run_of_neighbors.append((average, source))
        size += average.numel()
    if run_of_neighbors:
        yield run_of_neighbors
