"""Keep averages on the host for params on an accelerator, and update them beside training.

An update copies the params, without waiting, into page-locked host memory, which is kept. This
memory takes 2 bytes for each parameter in bfloat16 and 4 in float32, in addition to the average. A
thread updates the average from the copies. Nothing is allocated on the accelerator.

The tests simulate streams. On an H100, the averages had the same bits as on the CPU.
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
"""Bytes of one allocation for smaller tensors; PyTorch locks pages only in powers of two."""
_ALIGNED = 64

_offloads: weakref.WeakSet[Offload] = weakref.WeakSet()


class Offload:
    """Copies of params on the host, and a thread that works on them.

    Do not copy or pickle an ``Offload``: its owner calls :meth:`wait` and makes a new one. A fork
    of the process first waits for the work. The thread ends with the object. The process ends only
    after the work is done.

    Args:
        live: the params. Their addresses are kept; make a new ``Offload`` if their memory is
            replaced.

    Attributes:
        staged: for each tensor of ``live``, a CPU tensor of the same shape and dtype, which the
            work reads. It has the same strides if the live tensor is dense.
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
        """Schedule a copy of the current params, and then the work on the copies.

        This call first waits for the previous work. Optimizers wait for the copies, see
        :mod:`ema.torch_backend.gpu.side_stream`.

        Raises:
            StateError: a CUDA graph is being captured; work on the host cannot be part of it.
            Exception: the exception that the previous work has raised.
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
        """Wait until the work is done; call this before each use of what the work writes.

        Raises:
            Exception: the exception that the work has raised; it is raised only once.
        """
        if (pending := self._work) is not None:
            futures.wait([pending])  # after Ctrl-C the work stays pending
            self._work = None
            pending.result()

    def settle(self) -> None:
        """Wait before a fork, which copies memory; leave the work's exception to :meth:`wait`."""
        if self._work is not None:
            futures.wait([self._work])

    def without_thread(self) -> None:
        """Forget the thread: it does not exist in a forked process."""
        self._thread = None


def _after(side_stream: SideStream, work: Callable[[], object]) -> None:
    side_stream.synchronize()
    work()


def _stage(live: Sequence[Tensor]) -> list[Tensor]:
    """Allocate host memory for the tensors in few allocations, page-locked for tensors on a GPU.

    Large tensors come first. Smaller ones fill the space that is left up to a power of two.
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
