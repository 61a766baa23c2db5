"""What the design promises of an average, one contiguous tensor at a time.

Nothing here is fast, shared or prepared. An average is what ``torch.lerp`` gives with a weight that
was rounded once, and beside it the same in float64.
"""

import copy
import dataclasses
import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import ema
from ema.rounding import FIRST, SECOND, key_of, stream_of

__all__ = ["Reference", "Snapshot", "assert_same", "same_bits", "trainable"]


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have one dtype, shape and bits; one NaN is as good as another."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    ours, theirs = (_plain(tensor) for tensor in (ours, theirs))
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    same = ours.view(bits) == theirs.view(bits)
    return bool((same | (ours.isnan() & theirs.isnan())).all())


def _plain(tensor: Tensor) -> Tensor:
    """All values in a row, complex ones as pairs; a copy."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    return torch.view_as_real(tensor).flatten() if tensor.is_complex() else tensor.flatten()


def assert_same(what: str, ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Two mappings hold the same names and bits."""
    assert set(ours) == set(expected), f"{what}: {sorted(ours)}, expected {sorted(expected)}"
    for name, tensor in ours.items():
        right = expected[name]
        assert same_bits(tensor, right), f"{what}: `{name}` is {tensor}, expected {right}"


class Seen(NamedTuple):
    """A tensor of a model as it was at some time."""

    tensor: Tensor
    value: Tensor
    stride: tuple[int, ...]
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Seen":
        """A copy of what can be seen of it; the tensor itself is kept and so is its memory."""
        here = tensor.detach()
        return cls(tensor, here.clone(), here.stride(), here.data_ptr())


class Snapshot:
    """Everything that a model holds, to be compared with what it holds later.

    Attributes:
        tensors: by name, under each name that there is.
        groups: first name to all names of the same memory.
        parameters: names of the parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters(remove_duplicate=False))
        self.parameters = set(named)
        named |= dict(model.named_buffers(remove_duplicate=False))
        self.tensors = {name: Seen.of(tensor) for name, tensor in named.items()}
        self.groups = _groups(named)
        self._attributes = attributes(model)

    def value(self, name: str) -> Tensor:
        """The values that a tensor had."""
        return self.tensors[name].value

    def wants_grad(self, name: str) -> bool:
        """Whether any parameter of this memory requires grad now."""
        return any(self.tensors[each].tensor.requires_grad for each in self.groups[name])

    def check(
        self,
        model: nn.Module,
        shown: Mapping[str, Tensor] | None = None,
        *,
        moved: Collection[str] = (),
    ) -> None:
        """Make sure that ``model`` is as it was.

        Args:
            model: the same model.
            shown: what some of its tensors show now, by first name.
            moved: names of those that may lie in other memory for the time.
        """
        values = {
            name: self.value(name) if shown is None or first not in shown else shown[first]
            for first, names in self.groups.items()
            for name in names
        }
        named = dict(model.named_parameters(remove_duplicate=False))
        named |= dict(model.named_buffers(remove_duplicate=False))
        assert_same("the model", named, values)
        for name, seen in self.tensors.items():
            tensor = named[name]
            assert tensor is seen.tensor, f"`{name}` is another object"
            if name not in moved:
                assert tensor.stride() == seen.stride, f"`{name}` has other strides"
                assert tensor.data_ptr() == seen.address, f"`{name}` lies elsewhere"
        assert attributes(model) == self._attributes


def attributes(model: nn.Module) -> list[Any]:
    """What the modules hold besides tensors and children: plain values, and the keys of dicts."""
    found = []
    for name, module in model.named_modules():
        for key, value in sorted(vars(module).items()):
            found.append((name, key, list(value) if isinstance(value, dict) else repr(value)))
    return found


def _groups(named: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """First name to all names of the same tensor or memory."""
    by_memory: dict[object, list[str]] = {}
    for name, tensor in named.items():
        key: object = id(tensor)
        if tensor.numel():
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        by_memory.setdefault(key, []).append(name)
    return {names[0]: names for names in by_memory.values()}


def trainable(tensor: Tensor) -> bool:
    """Whether it can require grad."""
    return tensor.is_floating_point() or tensor.is_complex()


@dataclasses.dataclass
class Track:
    """One average of one tensor.

    Attributes:
        value: the average.
        remainder: of a compensated one.
        exact: the average in double precision; it stays behind once a value was not finite.
        reach: the largest magnitude that went into it.
        resolution: of the coarsest dtype that it has had.
        moves: the roundings that it has gone through.
    """

    value: Tensor
    remainder: Tensor
    exact: Tensor
    reach: float
    resolution: float
    moves: int = 1

    @classmethod
    def begun(cls, live: Tensor, dtype: torch.dtype) -> "Track":
        """An average that starts as a copy."""
        value = live.detach().to(dtype).clone(memory_format=torch.contiguous_format)
        resolution = torch.finfo(dtype).eps
        return cls(value, torch.zeros_like(value), _double(live), _reach(live), resolution)

    def convert(self, dtype: torch.dtype) -> None:
        """From now on the average has this dtype."""
        self.value, self.remainder = self.value.to(dtype), self.remainder.to(dtype)
        self.resolution = max(self.resolution, torch.finfo(dtype).eps)


def _double(tensor: Tensor) -> Tensor:
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to(dtype).clone(memory_format=torch.contiguous_format)


def _reach(tensor: Tensor) -> float:
    return float(tensor.detach().abs().double().max()) if tensor.numel() else 0.0


class Reference:
    """An ``EMAModel`` by its description.

    Args:
        model: the live model.
        options: the keyword arguments of the constructor, as a user would give them.

    Attributes:
        model: the live model.
        live: the live model as it must be, whatever is swapped in.
        tracks: name of the average to first name of a tensor to its average.
        started: whether there are averages of their own; before that they equal the live weights.
        step: calls of ``update``.
        count: updates made by them.
        skipped: updates that were due and not made.
        left_alone: first names of buffers that a rule for many asks for and that held infinities
            when they were first seen: they are not averaged.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        self.model = model
        self.options = dict(options)
        decay = self.options["decay"]
        decays = decay if isinstance(decay, Mapping) else {None: decay}
        self.schedules = {
            label: each if isinstance(each, ema.Schedule) else ema.ConstantDecay(decay=each)
            for label, each in decays.items()
        }
        self.live = Snapshot(model)
        self.begin()

    @property
    def labels(self) -> list[str | None]:
        """Names of the averages; None for a single one."""
        return list(self.schedules)

    def begin(self) -> None:
        """As a new ``EMAModel`` does: look at the buffers for the first time."""
        self.left_alone: set[str] = set()
        wanted = [name for name in self.wanted() if name not in self.live.parameters]
        self.left_alone = {
            name
            for name in wanted
            if not (self._is_named(name) or self.live.value(name).isfinite().all())
        }
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.step = self.count = self.skipped = 0
        self.started = False
        self.tracks: dict[str | None, dict[str, Track]] = {label: {} for label in self.labels}
        if not self.options["update_after_step"]:
            self._start()

    def _start(self) -> None:
        self.started = True
        self.tracks = {label: {} for label in self.labels}
        self._join()

    def _join(self) -> None:
        """Whatever is wanted now and has no average starts at its value."""
        for tracks in self.tracks.values():
            for name in self.wanted():
                if name not in tracks:
                    value = self.live.value(name)
                    tracks[name] = Track.begun(value, self._dtype(value))

    # --- what is averaged ---------------------------------------------------------------------

    def wanted(self) -> list[str]:
        """First names of what the options ask for now."""
        return [name for name in self.live.groups if self._is_wanted(name)]

    @property
    def averaged(self) -> list[str]:
        """First names of what has an average, or equals it before the start."""
        return [*self.tracks[self.labels[0]]] if self.started else self.wanted()

    def not_averaged(self) -> set[str]:
        """First names of the parameters that have no average."""
        firsts = {first for first in self.live.groups if first in self.live.parameters}
        return firsts - set(self.averaged)

    def _is_wanted(self, first: str) -> bool:
        names = self.live.groups[first]
        if not trainable(self.live.value(first)):
            return False
        if first not in self.live.parameters:
            return first not in self.left_alone and self._buffer_rule(names)[1] == "average"
        if _matches(self.options["exclude"] or (), names):
            return False
        if self.options["include"] is not None:
            return _matches(self.options["include"], names)
        return self.live.wants_grad(first)

    def _buffer_rule(self, names: list[str]) -> tuple[str, str]:
        """The first pattern that matches, and what it says."""
        rules = self.options["buffers"]
        rules = {"*": rules} if isinstance(rules, str) else rules
        found = [each for each in rules.items() if _matches([each[0]], names)]
        return found[0] if found else ("*", "copy")

    def _is_named(self, first: str) -> bool:
        """Whether the rule for a buffer is about this one, and not for all of a module."""
        pattern, _ = self._buffer_rule(self.live.groups[first])
        return pattern.split(".")[-1] != "*"

    def _dtype(self, live: Tensor, old: torch.dtype | None = None) -> torch.dtype:
        given = self.options["dtype"]
        if given is None:
            wide = torch.promote_types(live.dtype, torch.float32)
            return wide if old is None else torch.promote_types(wide, old)
        if live.is_complex():
            return torch.promote_types(given, torch.float32).to_complex()
        return given

    # --- an update ----------------------------------------------------------------------------

    def look(self) -> None:
        """The model has changed: an average is never narrower than its tensor."""
        for tracks in self.tracks.values():
            for name, track in tracks.items():
                track.convert(self._dtype(self.live.value(name), track.value.dtype))

    def update(self) -> bool:
        """Count a step and make an update if one is due.

        Returns:
            Whether it is refused for what is not finite, and nothing has changed.
        """
        step = self.step + 1
        since = step - self.options["update_after_step"]
        due = since > 0 and since % self.options["update_every"] == 0
        on_nonfinite = self.options["on_nonfinite"]
        names = {*self.averaged, *self.wanted()}
        bad = due and on_nonfinite != "propagate" and not self._all_finite(names)
        if bad and on_nonfinite == "raise":
            return True
        self.step = step
        if since < 0:
            self.started = False
            self.tracks = {label: {} for label in self.labels}
        elif since == 0:
            self._start()
        elif bad:
            self.skipped += 1
        else:
            self.look()
            newcomers = set(self.wanted()) - set(self.averaged)
            if on_nonfinite == "propagate" or self._all_finite(newcomers):
                self._join()
            if due:
                self.count += 1
                self._move()
        return False

    def _all_finite(self, names: Collection[str]) -> bool:
        return all(bool(self.live.value(name).isfinite().all()) for name in names)

    def _move(self) -> None:
        every = self.options["update_every"]
        for label, schedule in self.schedules.items():
            weight = schedule.weight(float(self.count), every)
            for name, track in self.tracks[label].items():
                self._move_one(name, track, self.live.value(name), weight)

    def _move_one(self, name: str, track: Track, live: Tensor, weight: float) -> None:
        wide = track.value.dtype in {torch.float64, torch.complex128}
        rounded = weight if wide else float(np.float32(weight))
        if self.options["compensated"]:
            _compensate(track, live.to(track.value.dtype), rounded)
        elif track.value.dtype == torch.bfloat16:
            moved = _lerp(track.value.float(), live.float(), rounded)
            if rounded == 1.0 or not self.options["stochastic_rounding"]:
                track.value = moved.to(torch.bfloat16)
            elif rounded:
                track.value = _rounded(moved, name, self.count, self.options["seed"])
        else:
            track.value = _lerp(track.value, live.to(track.value.dtype), rounded)
        track.exact = _lerp(track.exact, _double(live), weight)
        track.reach = max(track.reach, _reach(live))
        track.moves += 1

    # --- what is seen of it -------------------------------------------------------------------

    def averages(self, label: str | None) -> dict[str, Tensor]:
        """First name to average."""
        if not self.started:
            names = self.wanted()
            return {n: self.live.value(n).to(self._dtype(self.live.value(n))) for n in names}
        return {name: track.value for name, track in self.tracks[label].items()}

    def remainders(self, label: str | None) -> dict[str, Tensor]:
        """First name to remainder, where there are any."""
        if not (self.started and self.options["compensated"]):
            return {}
        return {name: track.remainder for name, track in self.tracks[label].items()}

    def shown(self, label: str | None) -> dict[str, Tensor]:
        """The averages as the model shows them, in its own dtypes."""
        averages = self.averages(label)
        return {name: value.to(self.live.value(name).dtype) for name, value in averages.items()}

    def check_exact(self, label: str | None, averages: Mapping[str, Tensor]) -> None:
        """The averages are as far from the float64 ones as rounding explains."""
        for name, track in self.tracks[label].items() if self.started else ():
            if not math.isfinite(track.reach) or not track.exact.isfinite().all():
                continue
            moves = 4 if self.options["compensated"] else track.moves + 4
            bound = moves * track.resolution * track.reach + torch.finfo(torch.float32).tiny
            error = _reach(averages[name].to(track.exact.dtype) - track.exact)
            assert error <= bound, f"`{name}` is {error} from float64, which is more than {bound}"

    # --- states -------------------------------------------------------------------------------

    def saved(self) -> "Reference":
        """The state as it is now, for :meth:`load`."""
        kept = copy.copy(self)
        kept.tracks = copy.deepcopy(self.tracks)
        if not self.started:
            kept.started = True
            kept.tracks = {label: {} for label in self.labels}
            kept._join()
        return kept

    def load(self, state: "Reference", labels: Collection[str | None] = ()) -> None:
        """Go on from a state: an average that exists keeps its dtype where that is the wider one.

        Through ``update_after_step`` the average equals the live weights, whatever the state holds.

        Args:
            state: of :meth:`saved`.
            labels: of several averages only these.
        """
        self.step = state.step
        if state.step < self.options["update_after_step"]:
            self.started = False
            self.count = self.skipped = 0
            self.tracks = {label: {} for label in self.labels}
            return
        before, self.started = self.tracks, True
        self.tracks = dict(before)
        for label in labels or self.labels:
            self.tracks[label] = copy.deepcopy(state.tracks[label])
            for name, track in self.tracks[label].items():
                old = before[label].get(name)
                track.convert(self._dtype(self.live.value(name), old and old.value.dtype))
                track.moves += 1
        self.count, self.skipped = state.count, state.skipped


def _matches(patterns: Collection[str], names: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _lerp(average: Tensor, params: Tensor, weight: float) -> Tensor:
    if weight == 0.0:
        return average.clone()
    if weight == 1.0:
        return params.clone(memory_format=torch.contiguous_format)
    if average.is_complex():
        pair = _lerp(torch.view_as_real(average), torch.view_as_real(params.contiguous()), weight)
        return torch.view_as_complex(pair)
    return torch.lerp(average, params.contiguous(), weight)


def _compensate(track: Track, params: Tensor, weight: float) -> None:
    """The formula of ``EMAModel``, with its one fused multiply-add."""
    if weight == 0.0:
        return
    if weight == 1.0:
        track.value = params.clone(memory_format=torch.contiguous_format)
        track.remainder = torch.zeros_like(track.value)
        return
    c, average = (_real(tensor) for tensor in (track.remainder, track.value))
    y = torch.add(c, _real(params) - average - c, alpha=weight)
    moved = average + y
    remainder = y - (moved - average)
    if track.value.is_complex():
        moved, remainder = torch.view_as_complex(moved), torch.view_as_complex(remainder)
    track.value, track.remainder = moved, remainder


def _real(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _rounded(exact: Tensor, name: str, count: int, seed: int) -> Tensor:
    """The rule of ``ema.rounding`` for a whole tensor."""
    if not exact.numel():
        return exact.to(torch.bfloat16)
    index = np.arange(exact.numel(), dtype=np.uint32)
    bits = _mix(index ^ np.uint32(key_of(stream_of(name, seed), count))) >> np.uint32(16)
    values = exact.numpy().reshape(-1)
    total = (values.view(np.uint32) + bits) & np.uint32(0xFFFF0000)
    rounded = np.where(np.isnan(values), np.float32(np.nan), total.view(np.float32))
    return torch.from_numpy(rounded.reshape(tuple(exact.shape))).to(torch.bfloat16)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ x >> np.uint32(16)) * np.uint32(FIRST)
    x = (x ^ x >> np.uint32(15)) * np.uint32(SECOND)
    return x ^ x >> np.uint32(16)
