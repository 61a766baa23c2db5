"""Work on a stream of its own, beside the next forward and backward pass, until the weights change.

An update reads the params, and so do the passes: the two can overlap. The optimizer writes them, so
it waits, on the device and not on the host: PyTorch tells before each ``Optimizer.step``. Whoever
writes weights by other means calls :meth:`Lane.before_write`. Where nobody has said so since the
last update, nobody may say so before the next one: that update is not overlapped.

This was run with simulated streams, and has not been measured on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ema.torch_backend.interrupts import uninterrupted

__all__ = ["Lane"]

_lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
"""Those that optimizers wait for."""
_hooked = False


class Lane:
    """A stream on each CUDA device for work that others wait for; elsewhere work is done at once.

    Every reader and writer of what the work writes calls :meth:`wait` first. Within a CUDA graph
    that is being captured the work is part of the graph, and there is nothing to wait for:
    ``torch.cuda.graph`` has waited for everything before. Copies and pickles are lanes without work.

    Args:
        devices: of the tensors that the work reads and writes.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = {device for device in devices if device.type == "cuda"}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._done: dict[torch.device, torch.cuda.Event] = {}
        self._announced = False

    def __reduce__(self) -> tuple[type[Lane], tuple[list[torch.device]]]:
        return type(self), (list(self._devices),)

    def run(self, work: Callable[[], object]) -> None:
        """Do the work after all that the current streams hold by now, beside what comes then.

        Only if a writer has waited since the last time, see above; else on the current streams.
        """
        if not self._devices or torch.cuda.is_current_stream_capturing():
            work()
            return
        _announce(self)
        with uninterrupted(), ExitStack() as entered:
            beside, self._announced = self._announced, False
            if not beside:
                self.wait()
            current = {device: torch.cuda.current_stream(device) for device in self._devices}
            used = {d: self._stream(d) if beside else s for d, s in current.items()}
            for device, stream in used.items():
                if beside:
                    stream.wait_stream(current[device])
                    entered.enter_context(torch.cuda.stream(stream))
            try:
                work()
            finally:
                for device, stream in used.items():
                    if device not in self._done:
                        self._done[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    self._done[device].record(stream)

    def wait(self) -> None:
        """Let the current streams go on when the work is done; the host goes on at once."""
        if self._done and not torch.cuda.is_current_stream_capturing():
            for device, done in self._done.items():
                torch.cuda.current_stream(device).wait_event(done)

    def before_write(self) -> None:
        """The same, by whoever writes what the work reads and does so every time.

        PyTorch's optimizers do; a loop that writes weights by hand calls it before.
        """
        self.wait()
        self._announced = True

    def synchronize(self) -> None:
        """Let the host go on when the work is done."""
        for done in self._done.values():
            done.synchronize()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of these from being used again before the work on it is done.

        Once for each tensor: averages, params and buffers, when the work is prepared.
        """
        for tensor in tensors:
            if tensor.device in self._devices:
                tensor.record_stream(self._stream(tensor.device))

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


def _announce(lane: Lane) -> None:
    """Have optimizers wait for this lane while it lives.

    There is one hook for all, and it stays: a lane may go away while the hooks are gone through.
    """
    global _hooked  # noqa: PLW0603
    _lanes.add(lane)
    if not _hooked:
        _hooked = True
        # a compiled step would try to trace the streams
        hook = torch.compiler.disable(_before_step)  # type: ignore[no-untyped-call]
        register_optimizer_step_pre_hook(hook)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
    for lane in list(_lanes):
        lane.before_write()
