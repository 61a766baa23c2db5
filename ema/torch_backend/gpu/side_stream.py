"""Run an update on its own stream, beside the next forward and backward pass.

An update and the passes only read the params, so they can overlap. The optimizer writes the params,
so it waits for the update, on the device and not on the host: PyTorch calls a hook before each
``Optimizer.step``. Other writes to the params cannot be seen in advance. So an update overlaps only
if every write since the previous update was announced. All of these conditions must hold:

- since the previous update, each param's optimizer has made a step, or
  :meth:`SideStream.before_write` was called;
- there was an earlier update, and the first condition held before every earlier update but the
  first one;
- the version counters of an optimizer's params had not changed before its step (sharpness-aware
  minimization writes the params before the step);
- none of these optimizers has made a step within a CUDA graph, because a replay calls no hook;
- none of these optimizers has ``train`` and ``eval`` methods that rewrite the weights
  (schedule-free optimizers have them).

``load_state_dict`` of the model and of these optimizers waits as well. A step that was compiled
with ``torch.compile`` calls no hook; then updates run in order with all other work.

The tests simulate streams. ``docs/benchmarks.md`` has measurements on one H100.
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
"""Optimizers that may write unannounced: their steps were captured, or they have modes."""
_seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
"""Optimizers with a hook that runs before they load a state."""
_hooked = False
_version = attrgetter("_version")  # the number of writes to a tensor


def capturing() -> bool:
    """Whether the current CUDA stream is being captured into a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class SideStream:
    """Runs work on its own stream on each CUDA device; on other devices the work runs at once.

    Call :meth:`wait` before you read or write what the work writes. While a CUDA graph is being
    captured, the work becomes part of the graph and needs no wait, because ``torch.cuda.graph`` has
    waited for all earlier work.

    Args:
        devices: devices of the tensors that the work reads and writes.
        params: params that the work reads and optimizers write.
        modules: modules that hold the params and may load other values into them.
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
        self._versions = self._now()  # at the last update, for the params not announced since
        self._surprised = False  # whether a write came before the step that announces it
        self._by_hand = False
        self._ran = False
        self._reliable = True  # whether every write since the first update was announced
        if self._devices:
            _announce(self)
        self._loading = [
            module.register_load_state_dict_pre_hook(_BeforeLoading(self))  # type: ignore[no-untyped-call]
            for module in (modules if self._devices else ())
        ]

    def run(self, work: Callable[[], object]) -> None:
        """Run the work after everything already on the current streams, and beside later work.

        If a write since the previous update was unannounced (see the module's documentation), the
        work runs on the current streams.
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
                        # with `blocking`, a waiting host sleeps and frees its core
                        self._done[device] = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                    self._done[device].record(stream)

    def wait(self) -> None:
        """Make the current streams wait until the work is done; the host continues at once."""
        if self._done and not torch.cuda.is_current_stream_capturing():
            for device, done in self._done.items():
                torch.cuda.current_stream(device).wait_event(done)

    def before_write(self) -> None:
        """Wait, and announce that the caller is about to write what the work reads.

        Call this before each write to the weights by hand. PyTorch's optimizers announce their
        writes themselves.
        """
        self.wait()
        self._by_hand = True

    def before_step(self, optimizer: Optimizer) -> None:
        """Wait and note which params of this side stream the optimizer will write, if any."""
        if not self._holds(optimizer):
            return
        self.wait()
        for param in _params_of(optimizer):
            now = _version(param)
            self._surprised = self._surprised or self._versions.pop(id(param), now) != now

    def before_load(self, optimizer: Optimizer) -> None:
        """Wait, if the optimizer writes any of the params."""
        if self._holds(optimizer):
            self.wait()

    def synchronize(self) -> None:
        """Make the host wait until the work is done."""
        for done in self._done.values():
            done.synchronize()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of these tensors from being reused before the work on it is done.

        Call this once for each tensor when the work is prepared: averages, params and buffers.
        """
        for tensor in tensors:
            if tensor.device in self._devices:
                tensor.record_stream(self._stream(tensor.device))

    def release(self) -> None:
        """Remove the hooks from the modules; call it after the last update."""
        for handle in self._loading:
            handle.remove()
        self._loading = []

    def _all_announced(self) -> bool:
        """Whether every write since the last update was announced; start to record anew."""
        silent = any(self._holds(optimizer) for optimizer in _silent)
        announced = bool(self._params) and not self._versions and not silent
        if self._ran and not (announced or self._by_hand):
            self._reliable = False  # a graph's replay may have written, and may write again
        announced = announced and self._ran and self._reliable and not self._surprised
        announced = announced or self._by_hand
        self._ran = True
        self._by_hand = self._surprised = False
        self._versions = self._now()
        return announced

    def _holds(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer writes any of the params."""
        return any(id(param) in self._params for param in _params_of(optimizer))

    def _now(self) -> dict[int, int]:
        return {name: _version(param) for name, param in self._params.items()}

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


class _BeforeLoading:
    """A hook that waits before a module loads a state; copies and pickles of it do nothing."""

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
    """Make optimizers wait for this side stream while it exists.

    All side streams share one hook, which is never removed: a side stream may be deleted while
    PyTorch calls the hooks.
    """
    global _hooked  # noqa: PLW0603
    _side_streams.add(side_stream)
    if not _hooked:
        _hooked = True
        register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
    if torch.compiler.is_compiling():
        return  # this line is being traced; a compiled step announces nothing
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
