"""Averages on the host of params on an accelerator, brought up to date behind the training step.

At an update the params are copied, without waiting, into memory of the host that is page-locked and
kept: 2 bytes a parameter in bfloat16 and 4 in float32, beside the average. A thread averages from
there. On the accelerator nothing is allocated.

Streams are simulated in the tests; on an H100 averages had the bits of the CPU's.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from concurrent import futures
from functools import partial

import torch
from torch import Tensor

from ema.errors import StateError
from ema.torch_backend.calls import Call, run, uninterrupted
from ema.torch_backend.gpu.side_stream import SideStream
from ema.torch_backend.tensors.memory import is_dense

__all__ = ["Offload"]

_SEGMENT = 1 << 25
"""Bytes of one allocation where tensors are smaller; PyTorch locks powers of two only."""
_ALIGNED = 64

_offloads: weakref.WeakSet[Offload] = weakref.WeakSet()


class Offload:
    """Copies of params on the host, and a thread that works on them.

    An ``Offload`` is not copied or pickled: its owner calls :meth:`wait` and makes another one.
    A fork waits for the work. The thread ends with the object, and a process ends after the work.

    Args:
        live: the params. Their memory is kept; make another ``Offload`` if it is replaced.

    Attributes:
        staged: for each of ``live`` a tensor on the CPU of the same shape and dtype, and of the
            same strides where these are dense; the work reads them.
    """

    def __init__(self, live: Sequence[Tensor]) -> None:
        self.side_stream = SideStream(tensor.device for tensor in live)
        self.staged = _stage(live)
        self._copies: list[Call] = [
            partial(copy.copy_, tensor.detach(), non_blocking=tensor.is_cuda)
            for copy, tensor in zip(self.staged, live, strict=True)
        ]
        self._thread: futures.ThreadPoolExecutor | None = None
        self._work: futures.Future[None] | None = None
        self.side_stream.hold(live)
        _offloads.add(self)

    def run(self, work: Callable[[], object]) -> None:
        """Copy the params as they are now and do the work on the copies, both later.

        Waits for the work before. Optimizers wait for the copies, see :mod:`ema.torch_backend.gpu.side_stream`.

        Raises:
            StateError: a CUDA graph is being captured, of which the host cannot be a part.
            Exception: whatever the work before has raised.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise StateError("an average on the CPU cannot be updated within a CUDA graph")
        self.wait()
        if self._thread is None:
            self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="ema")
        with uninterrupted():
            self.side_stream.run(partial(run, self._copies))
            self._work = self._thread.submit(_after, self.side_stream, work)

    def wait(self) -> None:
        """Wait until the work is done; call it before each use of what it writes.

        Raises:
            Exception: whatever the work has raised, once.
        """
        if (pending := self._work) is not None:
            futures.wait([pending])  # Ctrl-C while waiting leaves it pending
            self._work = None
            pending.result()

    def settle(self) -> None:
        """Wait, and leave it to :meth:`wait` to raise: before a fork, which copies memory."""
        if self._work is not None:
            futures.wait([self._work])

    def without_thread(self) -> None:
        """Go on in a forked process, where the thread is none."""
        self._thread = None


def _after(side_stream: SideStream, work: Callable[[], object]) -> None:
    side_stream.synchronize()
    work()


def _stage(live: Sequence[Tensor]) -> list[Tensor]:
    """Memory of the host for these, page-locked for those on a GPU, in few allocations.

    Large tensors first: smaller ones fill what a power of two leaves.
    """
    sizes = [tensor.numel() * tensor.element_size() for tensor in live]
    left = sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes)
    segments: list[Tensor] = []
    staged: dict[int, Tensor] = {}
    for index in sorted(range(len(live)), key=sizes.__getitem__, reverse=True):
        tensor, size = live[index], sizes[index]
        taken = -(-size // _ALIGNED) * _ALIGNED
        fits = (
            number
            for number, free in enumerate(segments)
            if len(free) >= taken and (not tensor.is_cuda or free.is_pinned())
        )
        if (number := next(fits, None)) is None:
            number = len(segments)
            capacity = _power_of_two(max(taken, min(_SEGMENT, left)))
            pinned = tensor.is_cuda
            segments.append(
                torch.empty(capacity, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            )
        memory, segments[number] = segments[number].tensor_split([taken])
        left -= taken
        elements = memory[:size].view(tensor.dtype)
        staged[index] = (
            elements.as_strided(tensor.shape, tensor.stride())
            if is_dense(tensor)
            else elements.view(tensor.shape)
        )
    return [staged[index] for index in range(len(live))]


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _settle() -> None:
    for offload in list(_offloads):
        offload.settle()


def _without_threads() -> None:
    for offload in list(_offloads):
        offload.without_thread()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_settle, after_in_child=_without_threads)
