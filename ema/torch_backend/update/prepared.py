"""One update of all tracked tensors: prepared when the model is bound, run at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ema.errors import listing, warn
from ema.torch_backend.calls import uninterrupted
from ema.torch_backend.gpu.offload import Offload
from ema.torch_backend.gpu.side_stream import SideStream, capturing
from ema.torch_backend.settings import Settings
from ema.torch_backend.tensors.selection import Selection
from ema.torch_backend.tensors.tracked import Tracked
from ema.torch_backend.update.counters import Counters
from ema.torch_backend.update.guard import DeviceFlag, Guard
from ema.torch_backend.update.sweep import Sweep

__all__ = ["PreparedUpdate", "warn_without_streams"]


class PreparedUpdate:
    """The arithmetic of an update, the check for NaN before it, and the place where it runs.

    Args:
        tracked: the tensors by name.
        found: the selection that they belong to.
        settings: the options of the averages.

    Attributes:
        read: ids of live tensors that the update reads wherever their memory is by then.
        on_cuda: whether a live tensor is on a CUDA device.
        decides_on_device: whether the update itself finds out, on the device, if the live weights
            are finite.
    """

    def __init__(
        self, tracked: Mapping[str, Tracked], found: Selection, settings: Settings
    ) -> None:
        entries = list(tracked.values())
        self._settings = settings
        guarded = settings.precision.on_nonfinite == "skip"
        self._beside: SideStream | Offload | None = None
        with torch.inference_mode(mode=False):  # its buffers are used in any mode
            if any(map(_is_offloaded, entries)):
                self._beside = Offload([entry.live for entry in entries])
                entries = [
                    dataclasses.replace(entry, live=staged)
                    for entry, staged in zip(entries, self._beside.staged, strict=True)
                ]
            self._sweep = Sweep(entries, guarded=guarded)
        self.read = self._sweep.read
        self._guard = Guard(found.averaged, self.read)
        if settings.precision.on_nonfinite != "propagate":
            self._guard.prepare()
        live = [entry.live for entry in tracked.values()]
        if settings.overlap and self._beside is None:
            self._beside = _side_stream(live, found)
            kept = [tensor for entry in entries for tensor in entry.kept]
            self._beside.hold([*kept, *live, *self._sweep.tensors])
        self.on_cuda = any(tensor.is_cuda for tensor in live)
        self.decides_on_device = guarded and self._sweep.on_device
        self._runs_at_once = self._beside is None and not self.decides_on_device

    def __call__(
        self, weights: Sequence[float], counters: Counters, keep: Callable[[Counters], None]
    ) -> None:
        """Make the update that ``counters`` count.

        Args:
            weights: one for each average.
            counters: as they are after the update.
            keep: is called with the counters at the moment of the update, so that Ctrl-C, or a
                handler of another signal that saves, finds averages and counters that belong together.
        """
        if self._runs_at_once:
            self._sweep(weights, counters.count, then=partial(keep, counters))
            return
        beside = self._beside
        flags: list[DeviceFlag] = []
        work = partial(self._sweep, weights, counters.count)
        if self.decides_on_device:
            work = partial(self._sweep_if_finite, weights, counters.count, flags)
        if isinstance(beside, Offload):
            beside.wait()  # which Ctrl-C may end
        with uninterrupted():
            if beside is None:
                work()
            else:
                beside.run(work)
            keep(dataclasses.replace(counters, pending=(*counters.pending, *flags)))
        if beside is not None and self._settings.rules.average_buffers:
            beside.wait()  # the next forward pass writes those

    def nonfinite(self) -> list[str]:
        """Names of the live tensors that hold NaN or Inf; empty where the device decides."""
        return [] if self.decides_on_device else self._guard.nonfinite()

    def wait(self) -> None:
        """Before the averages are read or written: wait for an update that runs beside the loop."""
        if self._beside is not None:
            self._beside.wait()

    def before_write(self) -> None:
        """Call before anything other than an optimizer writes live weights."""
        if isinstance(self._beside, SideStream):
            self._beside.before_write()

    def release(self) -> None:
        """Remove the hooks from the modules: this update will not run again."""
        if isinstance(self._beside, SideStream):
            self._beside.release()

    def keeps_from_capture(self) -> str:
        """The reason why this update cannot be part of a CUDA graph; empty if it can."""
        on_nonfinite = self._settings.precision.on_nonfinite
        if isinstance(self._beside, Offload):
            return "`device='cpu'` has the host make it"
        if self._settings.depends_on_count:
            return (
                "each replay would repeat its decay and its random bits. A constant decay is"
                " possible, and `stochastic_rounding=False`"
            )
        if on_nonfinite != "propagate" and not self.decides_on_device:
            return f"`on_nonfinite={on_nonfinite!r}` has the host look at the weights"
        return ""

    def _sweep_if_finite(
        self, weights: Sequence[float], count: int, flags: list[DeviceFlag]
    ) -> None:
        """Let the device decide whether the update is made."""
        finite = self._guard.all_finite()
        self._sweep(weights, count, finite)
        if not capturing():  # no host can wait for the decision of each replay
            flags.append(DeviceFlag(next(iter(finite.values()))))


def _side_stream(live: Sequence[Tensor], found: Selection) -> SideStream:
    return SideStream(
        (tensor.device for tensor in live),
        (tensor for tensor in found.averaged.values() if isinstance(tensor, nn.Parameter)),
        _holders(found),
    )


def _holders(found: Selection) -> Iterator[nn.Module]:
    """The modules that hold an averaged tensor themselves."""
    averaged = set(map(id, found.averaged.values()))
    for module in found.modules:
        if not averaged.isdisjoint(map(id, module.parameters(recurse=False))):
            yield module


def _is_offloaded(entry: Tracked) -> bool:
    """Whether the average is on the host and the params are not."""
    return entry.averages[0].device.type == "cpu" != entry.live.device.type


def warn_without_streams(tensors: Iterable[Tensor]) -> bool:
    """Whether these tensors are on an accelerator without overlap; warns if so."""
    without = {tensor.device.type for tensor in tensors} - {"cuda", "cpu", "meta"}
    if without:
        warn(
            f"`overlap=True` needs streams of CUDA or ROCm: on {listing(sorted(without))} updates"
            " are made in order with everything else"
        )
    return bool(without)
