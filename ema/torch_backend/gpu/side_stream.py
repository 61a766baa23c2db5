"""Work on a stream of its own, beside the next forward and backward pass, until the weights change.

An update reads the params, and so do the passes: the two can overlap. The optimizer writes them, so
it waits for the update, on the device and not on the host: PyTorch calls a hook before each
``Optimizer.step``. No other write to weights can be seen in advance. So an update overlaps only where
every write since the update before was announced, as far as that can be known:

- each param belongs to an optimizer that has made a step since, or :meth:`SideStream.before_write` was called;
- so it was before every earlier update but the first one, and there was an earlier one;
- until its step, the version counters of an optimizer's params had not moved (sharpness-aware
  minimization writes them before the step);
- none of these optimizers has made a step within a CUDA graph, whose replays call no hook, or has
  ``train`` and ``eval`` methods that rewrite the weights (schedule-free ones).

``load_state_dict`` of the model and of those optimizers waits as well. A step that ``torch.compile`` has
compiled calls no hook, and then updates run in order with everything else.

Streams are simulated in the tests; one H100 was measured, see ``docs/benchmarks.md``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ema.torch_backend.calls import uninterrupted

__all__ = ["SideStream", "capturing"]

_side_streams: weakref.WeakSet[SideStream] = weakref.WeakSet()
"""The side streams that optimizers wait for."""
_silent: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that may write without a word: their steps were captured, or they have modes."""
_seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers that tell before they load a state."""
_hooked = False
_version = attrgetter("_version")  # counts the writes to a tensor


def capturing() -> bool:
    """Whether the current stream of CUDA is being captured into a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class SideStream:
    """A stream on each CUDA device for work that others wait for; elsewhere work is done at once.

    Every reader and writer of what the work writes calls :meth:`wait` first. Within a CUDA graph
    that is being captured the work is part of the graph, and there is nothing to wait for:
    ``torch.cuda.graph`` has waited for everything before.

    Args:
        devices: of the tensors that the work reads and writes.
        params: that the work reads and that optimizers write.
        modules: that hold them, and may load other ones.
    """

    def __init__(
        self,
        devices: Iterable[torch.device],
        params: Iterable[Tensor] = (),
        modules: Iterable[nn.Module] = (),
    ) -> None:
        self._devices = {device for device in devices if device.type == "cuda"}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._done: dict[torch.device, torch.cuda.Event] = {}
        self._params = {id(param): param for param in params}
        self._versions = self._now()  # at the last update, of those not announced since
        self._surprised = False  # by a write before the step that announces it
        self._by_hand = False
        self._ran = False
        self._reliable = True  # whether every write was announced since the first time
        if self._devices:
            _announce(self)
        self._loading = [
            module.register_load_state_dict_pre_hook(_BeforeLoading(self))  # type: ignore[no-untyped-call]
            for module in (modules if self._devices else ())
        ]

    def run(self, work: Callable[[], object]) -> None:
        """Do the work after all that the current streams hold by now, beside what comes then.

        Only if every write since the last time was announced, see above; else on the current streams.
        """
        if not self._devices or torch.cuda.is_current_stream_capturing():
            work()
            return
        with uninterrupted(), ExitStack() as entered:
            beside = self._all_announced()
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
                        # a host that waits sleeps, and leaves its core to others
                        self._done[device] = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                    self._done[device].record(stream)

    def wait(self) -> None:
        """Let the current streams go on when the work is done; the host goes on at once."""
        if self._done and not torch.cuda.is_current_stream_capturing():
            for device, done in self._done.items():
                torch.cuda.current_stream(device).wait_event(done)

    def before_write(self) -> None:
        """Wait, before the caller writes what the work reads; a caller must do this before each write.

        PyTorch's optimizers do. A loop that writes weights by hand calls this method itself.
        """
        self.wait()
        self._by_hand = True

    def before_step(self, optimizer: Optimizer) -> None:
        """Wait, and note which params are about to be written, if any are of this side_stream."""
        if not self._holds(optimizer):
            return
        self.wait()
        for param in _params_of(optimizer):
            now = _version(param)
            self._surprised = self._surprised or self._versions.pop(id(param), now) != now

    def before_load(self, optimizer: Optimizer) -> None:
        """Wait, if it writes any of the params."""
        if self._holds(optimizer):
            self.wait()

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

    def release(self) -> None:
        """Take the hooks back from the modules, once the side_stream is not used any more."""
        for handle in self._loading:
            handle.remove()
        self._loading = []

    def _all_announced(self) -> bool:
        """Whether everything that was written since the last time was announced; begins anew."""
        silent = any(self._holds(optimizer) for optimizer in _silent)
        announced = bool(self._params) and not self._versions and not silent
        if self._ran and not (announced or self._by_hand):
            self._reliable = False  # the replay of a graph may have written, and may again
        announced = announced and self._ran and self._reliable and not self._surprised
        announced = announced or self._by_hand
        self._ran = True
        self._by_hand = self._surprised = False
        self._versions = self._now()
        return announced

    def _holds(self, optimizer: Optimizer) -> bool:
        """Whether it writes any of the params."""
        return any(id(param) in self._params for param in _params_of(optimizer))

    def _now(self) -> dict[int, int]:
        return {name: _version(param) for name, param in self._params.items()}

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


class _BeforeLoading:
    """Has a module that loads a state wait; its copies and pickles do nothing."""

    def __init__(self, side_stream: SideStream | None = None) -> None:
        self._side_stream = None if side_stream is None else weakref.ref(side_stream)

    def __call__(self, *_: object) -> None:
        side_stream = None if self._side_stream is None else self._side_stream()
        if side_stream is not None:
            side_stream.wait()

    def __reduce__(self) -> tuple[type[_BeforeLoading], tuple[()]]:
        return type(self), ()


def _params_of(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _announce(side_stream: SideStream) -> None:
    """Have optimizers wait for this side stream while it lives.

    There is one hook for all, and it stays: a side stream may go away while the hooks are gone through.
    """
    global _hooked  # noqa: PLW0603
    _side_streams.add(side_stream)
    if not _hooked:
        _hooked = True
        register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
    if torch.compiler.is_compiling():
        return  # this very line is being traced; what is compiled announces nothing
    side_streams = list(_side_streams)
    if not side_streams:
        return
    if torch.cuda.is_current_stream_capturing():
        _silent.add(optimizer)
        return
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        _silent.add(optimizer)
    if optimizer not in _seen:
        _seen.add(optimizer)
        optimizer.register_load_state_dict_pre_hook(_before_load)
    for side_stream in side_streams:
        side_stream.before_step(optimizer)


def _before_load(optimizer: Optimizer, state: Any) -> None:  # noqa: ARG001
    for side_stream in list(_side_streams):
        side_stream.before_load(optimizer)
