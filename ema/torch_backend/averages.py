"""The averages of a model's tensors, which follow the model as it changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor, nn

from ema.errors import ModelError, listing, warn
from ema.rounding import Stream, stream_of
from ema.torch_backend.calls import uninterrupted
from ema.torch_backend.gpu.side_stream import capturing
from ema.torch_backend.settings import Settings
from ema.torch_backend.swap.swap import Swap
from ema.torch_backend.tensors.fingerprint import Fingerprint
from ema.torch_backend.tensors.selection import ON_META, Selection, select
from ema.torch_backend.tensors.sharding import local_of, wrapped_like
from ema.torch_backend.tensors.special_buffers import FirstLook
from ema.torch_backend.tensors.tracked import Tracked, check_followed, track
from ema.torch_backend.update.counters import Counters
from ema.torch_backend.update.guard import Guard
from ema.torch_backend.update.prepared import PreparedUpdate, warn_without_streams

__all__ = ["Averages"]


@dataclasses.dataclass(frozen=True)
class _Bound:
    """The tracked tensors of a model as it was last inspected, and the update prepared for them.

    Attributes:
        tracked: by canonical name.
        selection: all tensors of the model.
        update: the update of them.
        fingerprint: tells whether the model has changed since.
        swaps: by the name of an average, the last swap of it, which may be used again.
    """

    tracked: dict[str, Tracked]
    selection: Selection
    update: PreparedUpdate
    fingerprint: Fingerprint
    swaps: dict[str | None, Swap] = dataclasses.field(default_factory=dict)

    def origins(self, found: Selection) -> dict[str, str]:
        """The name in ``found`` of each tensor that is tracked here, and its name here."""
        return {
            name: origin
            for name, origin in found.origins.items()
            if name in found.averaged and origin in self.tracked
        }

    def copies(self, number: int) -> list[dict[str, Tensor]]:
        """Copies of each average and then of each remainder, by name; sharded as the model is."""
        live = self.selection.averaged
        kept = {name: each.kept for name, each in self.tracked.items()}
        return [
            {name: wrapped_like(several[i].clone(), live[name]) for name, several in kept.items()}
            for i in range(number)
        ]


class Averages:
    """The averages of each selected tensor of ``model``, one or several, or none yet.

    Args:
        model: the module; it is inspected again whenever it has changed.
        settings: selection, number and kind of the averages.

    Attributes:
        incomplete: indices of the averages that hold some old and some new values, because
            :meth:`assign` was broken off.

    Raises:
        ModelError: no tensor is to be averaged, or one that cannot be.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._number = len(settings.schedules)
        self._model = model
        self._settings = settings
        self._bound: _Bound | None = None
        self._copied: list[dict[str, Tensor]] | None = None  # in a copy that is not bound yet
        self._first_look = FirstLook()
        self._unfit: list[str] = []  # newcomers that hold NaN or Inf, as the last look found
        self._warned_of_meta = self._warned_of_streams = False
        self.incomplete: frozenset[int] = frozenset()
        found = self._select()
        if not (found.averaged or found.pending):
            raise ModelError(
                f"the model has nothing to average: of its {len(found.others)} parameters none"
                " requires grad and is selected"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Support copies and pickles: they get their own values, without views or prepared updates."""
        self.wait()
        values = self._copied
        if self._bound is not None:
            kept = 2 if self._settings.precision.compensated else 1
            values = self._bound.copies(kept * self._number)
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

    @property
    def left_alone(self) -> dict[str, str]:
        """Name to reason, for each buffer that must not be averaged and was asked for in bulk."""
        return self._first_look.left_alone

    @property
    def swaps(self) -> dict[str | None, Swap]:
        """The last swap of each average into the model, as long as the tensors are the same."""
        return {} if self._bound is None else self._bound.swaps

    def start(self) -> None:
        """Start, or start again, as a copy of the live tensors."""
        self.wait()
        self._bind(self._select())
        self.incomplete = frozenset()

    def forget(self) -> None:
        """Hold nothing: the averages equal the live tensors again."""
        self.wait()
        if self._bound is not None:
            self._bound.update.release()
        self._bound = self._copied = None
        self.incomplete = frozenset()

    def follow(self, *, join: bool = False, due: bool = True) -> Selection:
        """Inspect the model and bind the averages to its tensors as they are now.

        Args:
            join: whether to start an average of every tensor that requires grad by now and has none.
            due: whether an update comes next. If that will be skipped or refused, nothing joins.

        Returns:
            The tensors of the model.

        Raises:
            ModelError: the model has changed in a way that the averages cannot follow. Nothing
                has changed here.
        """
        if self._copied is not None:
            self.assign(self._copied, dtypes={n: t.dtype for n, t in self._copied[0].items()})
        self._unfit = []
        bound = self._bound
        if bound is None:
            return self._select()
        if bound.fingerprint.changed() or (join and bound.selection.late):
            found = self._select(bound)
            bound = self._bind(_only(found.origins, found), bound)
            if join and bound.selection.late and not self._must_wait(found, due=due):
                bound = self._bind(found.under_its_own_names(), bound)
        return bound.selection

    def look(self, index: int) -> tuple[dict[str, Tensor], Selection]:
        """One average by canonical name, and the tensors of the model as they are now.

        Before the start the values are those of the live tensors, in the dtype and on the device of
        an average.
        """
        self.wait()
        found = self.follow()
        if self._bound is not None:
            return self.held(index), found
        values = {
            name: local_of(tensor).to(*self._kind(tensor, None))
            for name, tensor in found.averaged.items()
        }
        return values, found

    def look_for_views(self, index: int) -> tuple[dict[str, Tensor], Selection]:
        """The same for a module that shows the average: before the start the live tensors themselves."""
        if self.started:
            return self.look(index)
        found = self._select()
        return {name: local_of(tensor) for name, tensor in found.averaged.items()}, found

    def held(self, index: int) -> dict[str, Tensor]:
        """One average by canonical name, without a look at the model."""
        tracked = {} if self._bound is None else self._bound.tracked
        return {name: each.averages[index] for name, each in tracked.items()}

    def remainders(self, index: int) -> dict[str, Tensor]:
        """The remainders of one average; empty if it is not compensated or has not started."""
        tracked = {} if self._bound is None else self._bound.tracked
        return {name: each.remainders[index] for name, each in tracked.items() if each.remainders}

    def check_values(self) -> None:
        """Before an update, after ``follow(join=True)``: look for tensors that have no values.

        Raises:
            ModelError: there is nothing else to average.

        Warns:
            EMAWarning: once, if some are on the meta device.
        """
        bound = self._bound
        if bound is None or not bound.selection.pending:
            return
        pending = bound.selection.pending
        reasons = " or ".join(dict.fromkeys(pending.values()))
        if not bound.tracked:
            raise ModelError(
                f"`update` has nothing to average: {listing(pending)} have no values, they are"
                f" {reasons}"
            )
        on_meta = [name for name, reason in pending.items() if reason == ON_META]
        if on_meta and not self._warned_of_meta:
            self._warned_of_meta = True
            warn(f"{listing(on_meta)} are {ON_META} and have no values to average")

    def nonfinite(self) -> list[str]:
        """Names of the tensors that hold NaN or Inf now; after ``follow(join=True)``.

        Where the update itself finds out, these are only tensors that have no average yet.
        """
        return self._unfit if self._bound is None else self._unfit + self._bound.update.nonfinite()

    def update(
        self, weights: Sequence[float], counters: Counters, keep: Callable[[Counters], None]
    ) -> None:
        """Make the update that ``counters`` count, see :class:`PreparedUpdate`; after ``follow``."""
        if self._bound is None:
            keep(counters)
        else:
            self._bound.update(weights, counters, keep)

    def wait(self) -> None:
        """Before the averages are read or written: wait for an update that runs beside the loop."""
        if self._bound is not None:
            self._bound.update.wait()

    def before_write(self) -> None:
        """Call before anything other than an optimizer writes live weights."""
        if self._bound is not None:
            self._bound.update.before_write()

    @property
    def is_captured(self) -> bool:
        """Whether an update made now becomes part of a CUDA graph."""
        return (self._bound is None or self._bound.update.on_cuda) and capturing()

    def keeps_from_capture(self) -> str:
        """The reason why an update cannot be part of a CUDA graph; empty if it can."""
        bound = self._bound
        if bound is None:
            return "it has not started"
        reason = bound.update.keeps_from_capture()
        if not reason and (bound.selection.late or bound.fingerprint.changed()):
            return "the model has changed since the last update. Call `update()` once before"
        return reason

    def assign(
        self,
        values: Sequence[Mapping[str, Tensor]],
        only: int | None = None,
        *,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        """Take over these values, which fit the model; nothing else is averaged from now on.

        A tensor that is to be averaged and is not among them joins at the next update. Ctrl-C waits.
        If reading a value raises, the values before it stay, and :attr:`incomplete` names the averages.

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
            for name, tracked in bound.tracked.items():
                for index in changed:
                    tracked.take(values[index], name, tracked.averages[index])
                    if tracked.remainders:
                        remainders = values[self._number + index]
                        tracked.take(remainders, name, tracked.remainders[index])
            self.incomplete = before - changed

    def _select(self, before: _Bound | None = None, *, tracked: Collection[str] = ()) -> Selection:
        """The tensors of the model now: selected by the rules, tracked before, or given by name."""
        known = {} if before is None else before.selection.averaged
        return select(
            self._model,
            self._settings.rules,
            tracked or known,
            known=known,
            first_look=self._first_look,
        )

    def _must_wait(self, found: Selection, *, due: bool) -> bool:
        """Whether newcomers have to wait: they hold NaN, or the update that is due will not be made."""
        if self._settings.precision.on_nonfinite == "propagate":
            return False
        newcomers = {n: t for n, t in found.averaged.items() if n not in found.origins}
        self._unfit = Guard(newcomers).nonfinite()
        return bool(self._unfit or (due and self.nonfinite()))

    def _bind(
        self,
        found: Selection,
        before: _Bound | None = None,
        *,
        all_go_on: bool = True,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> _Bound:
        """Track the tensors that were found: averages from before go on, others start live.

        Args:
            found: the tensors.
            before: the averages so far.
            all_go_on: whether each average from before must go on.
            dtypes: by name, which averages are at least as wide as.

        Raises:
            ModelError: one of them cannot. Nothing has changed.
        """
        self.wait()
        old: dict[str, Tracked] = {}
        if before is not None:
            origins = before.origins(found)
            check_followed(before.tracked, found.averaged, origins, all_go_on=all_go_on)
            old = {name: before.tracked[origin] for name, origin in origins.items()}
        widths = {**(dtypes or {}), **{name: each.averages[0].dtype for name, each in old.items()}}
        kinds = {name: self._kind(t, widths.get(name)) for name, t in found.averaged.items()}
        tracked = track(
            found.averaged,
            kinds,
            self._streams(kinds),
            old,
            number=self._number,
            compensated=self._settings.precision.compensated,
        )
        update = PreparedUpdate(tracked, found, self._settings)
        if self._settings.overlap and not self._warned_of_streams:
            self._warned_of_streams = warn_without_streams(each.live for each in tracked.values())
        fingerprint = Fingerprint(found, self._settings.rules, update.read)
        if self._bound is not None:
            self._bound.update.release()
        self._bound = _Bound(tracked, found, update, fingerprint)
        self._copied = None
        return self._bound

    def _streams(self, kinds: Mapping[str, tuple[torch.device, torch.dtype]]) -> dict[str, Stream]:
        """The streams of random bits, by name, of the averages that are rounded by chance."""
        precision = self._settings.precision
        if not precision.stochastic_rounding:
            return {}
        narrow = [name for name, (_, dtype) in kinds.items() if dtype == torch.bfloat16]
        return {name: stream_of(name, precision.seed) for name in narrow}

    def _kind(self, tensor: Tensor, old: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
        """Device and dtype for the average of ``tensor``; one that exists never gets narrower."""
        dtype = self._settings.dtype
        if dtype is None:
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            if old is not None:
                dtype = torch.promote_types(dtype, old)
        elif tensor.is_complex():  # PyTorch has no complex dtype of two bfloat16
            dtype = torch.promote_types(dtype, torch.float32).to_complex()
        return self._settings.home or tensor.device, dtype


def _only(names: Container[str], found: Selection) -> Selection:
    """The selection with only these names averaged; the others wait for the next update."""
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
