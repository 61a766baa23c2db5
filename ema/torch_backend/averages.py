"""The averages of a model's tensors, which follow the model as it changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor, nn

from ema.errors import ModelError, difference, listing, warn
from ema.rounding import stream_of
from ema.torch_backend.calls import uninterrupted
from ema.torch_backend.gpu.offload import Offload
from ema.torch_backend.gpu.side_stream import SideStream, capturing
from ema.torch_backend.settings import Settings
from ema.torch_backend.swap.swap import Swap
from ema.torch_backend.tensors.fingerprint import Fingerprint
from ema.torch_backend.tensors.memory import allocate, is_dense
from ema.torch_backend.tensors.selection import ON_META, Selection, select
from ema.torch_backend.tensors.sharding import (
    Box,
    box_of,
    is_sharded,
    local_of,
    wrapped_like,
)
from ema.torch_backend.tensors.special_buffers import FirstLook
from ema.torch_backend.update.counters import Counters
from ema.torch_backend.update.guard import DeviceFlag, Guard
from ema.torch_backend.update.stretches import Entry
from ema.torch_backend.update.sweep import Sweep

__all__ = ["Averages"]


@dataclasses.dataclass(frozen=True)
class _Bound:
    """Averages, the live tensors that they belong to, and what is prepared for the two.

    Of a sharded tensor the averages are plain tensors for the part that is here, in its box.

    Attributes:
        slots: canonical name to the averages of a tensor and, where they are compensated, as many
            remainders after them.
        boxes: where in the whole tensor these are.
        addresses: where the memory of each live tensor began when this was prepared.
        selection: the tensors.
        sweep: an update.
        guard: a look for what is not finite.
        fingerprint: whether the tensors are still these.
        beside: where an update runs that the loop does not wait for.
        on_cuda: whether a live tensor is on a CUDA device.
        swaps: by the name of an average, the last swap of it, which the next one may spare.
    """

    slots: dict[str, tuple[Tensor, ...]]
    boxes: dict[str, Box]
    addresses: dict[str, int]
    selection: Selection
    sweep: Sweep
    guard: Guard
    fingerprint: Fingerprint
    beside: SideStream | Offload | None
    on_cuda: bool
    swaps: dict[str | None, Swap] = dataclasses.field(default_factory=dict)

    def origins(self, found: Selection) -> dict[str, str]:
        """The name in ``found`` of each tensor that has an average here, and its name here."""
        return {
            name: origin
            for name, origin in found.origins.items()
            if name in found.averaged and origin in self.slots
        }


class Averages:
    """Averages for each selected tensor of ``model``, one or several, or none yet.

    Args:
        model: the module; it is looked through again whenever it has changed.
        settings: what is averaged, how many averages there are of it, and of which kind.

    Attributes:
        incomplete: which averages hold a part of their old values and a part of new ones, since
            :meth:`assign` broke off.

    Raises:
        ModelError: there is nothing to average, or something that cannot be.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._number = len(settings.schedules)
        self._slots = (2 if settings.precision.compensated else 1) * self._number
        self._guards = settings.precision.on_nonfinite == "skip"
        self._model = model
        self._settings = settings
        self._bound: _Bound | None = None
        self._copied: list[dict[str, Tensor]] | None = None  # of a copy that is not bound yet
        self._first_look = FirstLook()
        self._unfit: list[str] = []  # newcomers that hold NaN or Inf, as the last look found
        self._warned_of_meta = False
        self._warned_of_streams = False
        self.incomplete: frozenset[int] = frozenset()
        found = self._select()
        if not (found.averaged or found.pending):
            raise ModelError(
                f"the model has nothing to average: of its {len(found.others)} parameters none"
                " requires grad and is selected"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: values of their own, no views and nothing prepared."""
        self.wait()
        values = self._copied
        if self._bound is not None:
            values = [
                {
                    name: wrapped_like(several[index].clone(), self._bound.selection.averaged[name])
                    for name, several in self._bound.slots.items()
                }
                for index in range(self._slots)
            ]
        if (child := get_spawning_popen()) is not None:
            # the memory goes to a process that is started, which opens it later than now
            vars(child).setdefault("_averages", []).append(values)
        return {**self.__dict__, "_bound": None, "_copied": values}

    def apart(self) -> Averages:
        """The averages of this moment for a copy or a pickle, which may be made later."""
        copy = object.__new__(Averages)
        copy.__dict__.update(self.__getstate__())
        return copy

    @property
    def started(self) -> bool:
        """Whether there are averages; until then they equal the live tensors."""
        return self._bound is not None or self._copied is not None

    def start(self) -> None:
        """Start, or start again, as a copy of the live tensors."""
        self.wait()
        self._bind(self._select())
        self.incomplete = frozenset()

    def forget(self) -> None:
        """Hold nothing: the averages equal the live tensors again."""
        self.wait()
        self._release()
        self._bound = self._copied = None
        self.incomplete = frozenset()

    def follow(
        self, *, join: bool = False, due: bool = True
    ) -> tuple[dict[str, tuple[Tensor, ...]], Selection]:
        """Look at the model: the averages of each tensor by canonical name, and its tensors as they are now.

        Before the start the averages are the live tensors, as the averages would hold them.

        Args:
            join: whether to start an average of what requires grad by now and has none.
            due: whether an update comes next. If that will be skipped or refused, nothing joins.

        Raises:
            ModelError: the model has changed in a way that the averages cannot follow. Nothing
                has changed here.
        """
        if self._copied is not None:
            self.assign(self._copied, dtypes={n: t.dtype for n, t in self._copied[0].items()})
        self._unfit = []
        if self._bound is None:
            found = self._select()
            same = {n: local_of(t).to(*self._kind(t, None)) for n, t in found.averaged.items()}
            return {name: (tensor,) * self._number for name, tensor in same.items()}, found
        if self._bound.fingerprint.changed() or (join and self._bound.selection.late):
            found = self._select(self._bound)
            self._bind(_only(found.origins, found), self._bound)
            if join and self._bound.selection.late and not self._must_wait(found, due=due):
                self._bind(found.under_its_own_names(), self._bound)
        return self._bound.slots, self._bound.selection

    def _must_wait(self, found: Selection, *, due: bool) -> bool:
        """Whether newcomers have to wait: they hold NaN, or the update that is due will not be made."""
        if self._settings.precision.on_nonfinite == "propagate":
            return False
        newcomers = {n: t for n, t in found.averaged.items() if n not in found.origins}
        self._unfit = Guard(newcomers).nonfinite()
        return bool(self._unfit or (due and self.nonfinite()))

    @property
    def left_alone(self) -> dict[str, str]:
        """Name to reason, for each buffer that must not be averaged and was asked for in bulk."""
        return self._first_look.left_alone

    def check_values(self) -> None:
        """Before an update: look for tensors that have no values; after ``follow(join=True)``.

        Raises:
            ModelError: there is nothing else to average.

        Warns:
            EMAWarning: once, where some are on the meta device.
        """
        bound = self._bound
        if bound is None or not bound.selection.pending:
            return
        pending = bound.selection.pending
        reasons = " or ".join(dict.fromkeys(pending.values()))
        if not bound.slots:
            raise ModelError(
                f"`update` has nothing to average: {listing(pending)} have no values, they are"
                f" {reasons}"
            )
        on_meta = [name for name, reason in pending.items() if reason == ON_META]
        if on_meta and not self._warned_of_meta:
            self._warned_of_meta = True
            warn(f"{listing(on_meta)} are {ON_META} and have no values to average")

    def _release(self) -> None:
        """Have the modules forget an overlap that is not used any more."""
        if self._bound is not None and isinstance(self._bound.beside, SideStream):
            self._bound.beside.release()

    def wait(self) -> None:
        """Before the averages are read or written: until an update beside the loop is done."""
        if self._bound is not None and self._bound.beside is not None:
            self._bound.beside.wait()

    def held(self) -> dict[str, tuple[Tensor, ...]]:
        """The averages without a look at the model."""
        return {} if self._bound is None else self._bound.slots

    def remainders(self, index: int) -> dict[str, Tensor]:
        """Those of one average; none where it is not compensated or has not started."""
        slot = self._number + index
        return {name: several[slot] for name, several in self.held().items() if slot < len(several)}

    def nonfinite(self) -> list[str]:
        """Names of the tensors that hold NaN or Inf now; after ``follow(join=True)``.

        Where an update finds out by itself, these are only tensors that have no average yet.
        """
        if self._bound is None or self.guarded_on_device:
            return self._unfit
        return [*self._unfit, *self._bound.guard.nonfinite()]

    @property
    def guarded_on_device(self) -> bool:
        """Whether an update finds out by itself, and on the device, if it may be made."""
        return self._bound is not None and self._guards and self._bound.sweep.on_device

    @property
    def swaps(self) -> dict[str | None, Swap]:
        """The last swap of each average into the model, as long as the tensors are the same."""
        return {} if self._bound is None else self._bound.swaps

    @property
    def is_captured(self) -> bool:
        """Whether an update made now becomes part of a CUDA graph."""
        return (self._bound is None or self._bound.on_cuda) and capturing()

    def keeps_from_capture(self) -> str:
        """Why an update cannot be part of a CUDA graph; empty if it can."""
        bound, guard = self._bound, self._settings.precision.on_nonfinite
        if bound is None:
            return "it has not started"
        if isinstance(bound.beside, Offload):
            return "`device='cpu'` has the host make it"
        if self._settings.depends_on_count:
            return (
                "each replay would repeat its decay and its random bits. A constant decay is"
                " possible, and `stochastic_rounding=False`"
            )
        if guard == "raise" or (guard == "skip" and not self.guarded_on_device):
            return f"`on_nonfinite={guard!r}` has the host look at the weights"
        if bound.selection.late or bound.fingerprint.changed():
            return "the model has changed since the last update. Call `update()` once before"
        return ""

    def before_write(self) -> None:
        """Before somebody other than an optimizer writes live weights."""
        if self._bound is not None and isinstance(self._bound.beside, SideStream):
            self._bound.beside.before_write()

    def update(
        self, weights: Sequence[float], counters: Counters, keep: Callable[[Counters], None]
    ) -> None:
        """Make the update that ``counters`` count; after ``follow(join=True)``.

        Args:
            weights: one for each average.
            counters: as they are after the update.
            keep: is called with them in the moment of the update, so that Ctrl-C, or a handler of
                another signal that saves, finds both as they were or both as they will be.
        """
        bound = self._bound
        if bound is None:
            keep(counters)
            return
        if bound.beside is None and not self.guarded_on_device:
            bound.sweep(weights, counters.count, then=partial(keep, counters))
            return
        flags: list[DeviceFlag] = []
        work = partial(bound.sweep, weights, counters.count)
        if self.guarded_on_device:
            work = partial(_guarded, bound, weights, counters.count, flags)
        if isinstance(bound.beside, Offload):
            bound.beside.wait()  # which Ctrl-C may end
        with uninterrupted():
            if bound.beside is None:
                work()
            else:
                bound.beside.run(work)
            keep(dataclasses.replace(counters, pending=(*counters.pending, *flags)))
        if bound.beside is not None and self._settings.rules.average_buffers:
            bound.beside.wait()  # the next forward pass writes those

    def assign(
        self,
        values: Sequence[Mapping[str, Tensor]],
        only: int | None = None,
        *,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """Take over these values, which fit the model; nothing else is averaged from now on.

        What is to be averaged and is not among them joins at the next update. Ctrl-C waits.
        If reading a value raises, what was assigned before stays, and :attr:`incomplete` says so.

        Args:
            values: by name, of each average and then of each remainder, which is 0 where it is
                not given.
            only: the average that they are new for. The others go on with their own values, or
                start from live ones, and of the values given for them only the names count.
            dtypes: by name, which averages are at least as wide as; None: see ``dtype``.
        """
        names = values[0]
        found = _only(names, self._select(tracked=names))
        self.wait()
        with uninterrupted():
            bound = self._bind(found, self._bound, all_go_on=False, dtypes=dtypes)
            changed = frozenset(range(self._number) if only is None else [only])
            before, self.incomplete = self.incomplete, self.incomplete | changed
            for name, slots in bound.slots.items():
                for index, (slot, given) in enumerate(zip(slots, values, strict=True)):
                    if index % self._number not in changed:
                        continue
                    if name not in given:
                        slot.zero_()
                        continue
                    value = given[name]  # which may be read from a file each time
                    slot.copy_(box_of(value).part(local_of(value), bound.boxes[name]))
            self.incomplete = before - changed

    def look(self) -> Selection:
        """The tensors of the model as they are now, by the rules alone."""
        return self._select()

    def _select(self, before: _Bound | None = None, *, tracked: Collection[str] = ()) -> Selection:
        """The tensors of the model now: by the rules, and what has an average before or by name."""
        known = {} if before is None else before.selection.averaged
        return select(
            self._model,
            self._settings.rules,
            tracked or known,
            known=known,
            first_look=self._first_look,
        )

    def _bind(
        self,
        found: Selection,
        before: _Bound | None = None,
        *,
        all_go_on: bool = True,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> _Bound:
        """Average what was found: averages from before go on, what has none starts live.

        A tensor that was sharded since has its part of the average cut out: where every rank held
        all of it, nothing need be communicated.

        Args:
            found: the tensors.
            before: their averages so far.
            all_go_on: whether each average from before must go on.
            dtypes: by name, which averages are at least as wide as.

        Raises:
            ModelError: one of them cannot. Nothing has changed.
        """
        self.wait()
        boxes = {name: box_of(tensor) for name, tensor in found.averaged.items()}
        live = {
            name: local_of(tensor) if is_sharded(tensor) else tensor
            for name, tensor in found.averaged.items()
        }
        addresses = {name: tensor.data_ptr() for name, tensor in live.items()}
        old = {}
        if before is not None:
            _check_followed(before, found, boxes, addresses, all_go_on=all_go_on)
            origins = before.origins(found)
            old = {name: (before.boxes[o], before.slots[o]) for name, o in origins.items()}
        slots = self._slots_for(live, boxes, old, dtypes or {})
        entries = [
            self._entry(name, slots[name], tensor, boxes[name]) for name, tensor in live.items()
        ]
        offload = None
        with torch.inference_mode(mode=False):  # its buffers are used in any mode
            if any(_is_offloaded(entry) for entry in entries):
                offload = Offload([entry.live for entry in entries])
                pairs = zip(entries, offload.staged, strict=True)
                entries = [entry._replace(live=staged) for entry, staged in pairs]
            sweep = Sweep(entries, self._number, guarded=self._guards)
        guard = Guard(found.averaged, sweep.read)
        if self._settings.precision.on_nonfinite != "propagate":
            guard.prepare()
        fingerprint = Fingerprint(found, self._settings.rules, sweep.read)
        beside: SideStream | Offload | None = offload
        if self._settings.overlap and not self._warned_of_streams:
            self._warned_of_streams = _warn_without_streams(live.values())
        if offload is None and self._settings.overlap:
            beside = SideStream(
                (tensor.device for tensor in live.values()),
                (tensor for tensor in found.averaged.values() if isinstance(tensor, nn.Parameter)),
                _holders(found),
            )
            used = [tensor for several in slots.values() for tensor in several]
            beside.hold([*used, *live.values(), *sweep.tensors])
        self._release()
        on_cuda = any(tensor.is_cuda for tensor in live.values())
        self._bound = _Bound(
            slots, boxes, addresses, found, sweep, guard, fingerprint, beside, on_cuda
        )
        self._copied = None
        return self._bound

    def _slots_for(
        self,
        live: Mapping[str, Tensor],
        boxes: Mapping[str, Box],
        old: Mapping[str, tuple[Box, tuple[Tensor, ...]]],
        dtypes: Mapping[str, torch.dtype],
    ) -> dict[str, tuple[Tensor, ...]]:
        """Averages and remainders for these tensors: the old ones where they suit, or new ones."""
        dtypes = {**dtypes, **{name: several[0].dtype for name, (_, several) in old.items()}}
        kinds = {name: self._kind(tensor, dtypes.get(name)) for name, tensor in live.items()}
        renew = {
            name: tensor
            for name, tensor in live.items()
            if name not in old
            or boxes[name] != old[name][0]
            or not _suits(old[name][1][0], tensor, kinds[name])
        }
        fresh = [allocate(renew, kinds) for _ in range(self._slots)]
        for index, tensors in enumerate(fresh):
            for name, slot in tensors.items():
                if name in old:
                    box, several = old[name]
                    slot.copy_(box.part(several[index], boxes[name]))
                elif index < self._number:
                    slot.copy_(live[name].detach())
                else:
                    slot.zero_()
        return {
            name: tuple(tensors[name] for tensors in fresh) if name in renew else old[name][1]
            for name in live
        }

    def _entry(self, name: str, slots: tuple[Tensor, ...], live: Tensor, box: Box) -> Entry:
        precision = self._settings.precision
        stream = None
        if slots[0].dtype == torch.bfloat16 and precision.stochastic_rounding:
            stream = stream_of(name, precision.seed)
        return Entry(slots, live, box, stream)

    def _kind(self, tensor: Tensor, old: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
        """Device and dtype for the average of ``tensor``; one that exists never gets narrower."""
        dtype = self._settings.dtype
        if dtype is None:
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            if old is not None:
                dtype = torch.promote_types(dtype, old)
        elif tensor.is_complex():  # there is none of two bfloat16
            dtype = torch.promote_types(dtype, torch.float32).to_complex()
        return self._settings.device or tensor.device, dtype


def _only(names: Container[str], found: Selection) -> Selection:
    """What was found with these names averaged; the others wait for the next update."""
    later = {name: live for name, live in found.averaged.items() if name not in names}
    parameters = {name: live for name, live in later.items() if isinstance(live, nn.Parameter)}
    buffers = {name: live for name, live in later.items() if name not in parameters}
    return dataclasses.replace(
        found,
        averaged={name: live for name, live in found.averaged.items() if name in names},
        others={**found.others, **parameters},
        buffers={**found.buffers, **buffers},
        late=bool(later),
    )


def _warn_without_streams(tensors: Iterable[Tensor]) -> bool:
    """Say so if these are on an accelerator on which nothing can overlap."""
    without = {tensor.device.type for tensor in tensors} - {"cuda", "cpu", "meta"}
    if without:
        warn(
            f"`overlap=True` needs streams of CUDA or ROCm: on {listing(sorted(without))} updates"
            " are made in order with everything else"
        )
    return bool(without)


def _holders(found: Selection) -> Iterator[nn.Module]:
    """The modules that hold an averaged tensor themselves."""
    averaged = set(map(id, found.averaged.values()))
    for module in found.modules:
        if not averaged.isdisjoint(map(id, module.parameters(recurse=False))):
            yield module


def _guarded(bound: _Bound, weights: Sequence[float], count: int, flags: list[DeviceFlag]) -> None:
    """An update that the device makes or not."""
    finite = bound.guard.all_finite()
    bound.sweep(weights, count, finite)
    if not capturing():  # no host can wait for what a graph does at each replay
        flags.append(DeviceFlag(next(iter(finite.values()))))


def _is_offloaded(entry: Entry) -> bool:
    """Whether the average is on the host and the params are not."""
    return entry.slots[0].device.type == "cpu" != entry.live.device.type


def _suits(average: Tensor, tensor: Tensor, kind: tuple[torch.device, torch.dtype]) -> bool:
    same_layout = average.stride() == tensor.stride() or not is_dense(tensor)
    return (average.device, average.dtype) == kind and same_layout


def _check_followed(
    before: _Bound,
    found: Selection,
    boxes: Mapping[str, Box],
    addresses: Mapping[str, int],
    *,
    all_go_on: bool,
) -> None:
    """Make sure that averages can follow their tensors.

    Raises:
        ModelError: with all that cannot be followed.
    """
    origins = before.origins(found)
    gone = [name for name in before.slots if name not in origins.values()] if all_go_on else []
    phrases = [
        f"`{name}` is now the tensor that was called `{origins[name]}`, its own is gone"
        for name in gone
        if name in origins
    ]
    for name, origin in origins.items():
        if name != origin and addresses[name] != before.addresses[origin]:
            phrases.append(f"`{name}` was called `{origin}` and lies in other memory than then")
        phrases += _moved(name, boxes[name], before.boxes[origin])
    if text := difference([name for name in gone if name not in origins], (), phrases):
        raise ModelError(f"the model has changed: {text}")


def _moved(name: str, box: Box, before: Box) -> list[str]:
    """What keeps an average from following its tensor, in words."""
    if box.shape != before.shape:
        return [f"`{name}` has shape {box.shape}, its average {before.shape}"]
    if not before.covers(box):
        return [f"`{name}` was sharded anew: save() before and load() after that keep its average"]
    return []
