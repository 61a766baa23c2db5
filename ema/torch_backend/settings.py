"""Validated options of ``EMAModel`` and ``EMACallback``."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import torch

from ema import validate
from ema.checkpoint import Record
from ema.errors import ArgumentError, ArgumentTypeError, StateError, listing, shown
from ema.options import OnNonfinite, Precision, check_dtype, schedules_by_name, unknown_name
from ema.schedule_descriptions import describe_schedules, same_description
from ema.schedules import ConstantDecay, Schedule
from ema.torch_backend.tensors.selection import Rules

__all__ = ["Settings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Validated options of ``EMAModel`` and ``EMACallback``.

    The arguments are those of :class:`EMAModel`, which documents them.

    Attributes:
        schedules: the schedule of each average by its name; a single average has the name None.
        update_after_step: as given.
        update_every: as given.
        dtype: of all averages, or None.
        home: the device of all averages, or None.
        rules: which tensors are averaged.
        precision: how exactly they are averaged.
        overlap: as given.

    Raises:
        ArgumentError: an option is out of its range.
        ArgumentTypeError: an option has the wrong type.
    """

    decay: dataclasses.InitVar[object]
    update_after_step: int
    update_every: int
    dtype: torch.dtype | None
    device: dataclasses.InitVar[object]
    include: dataclasses.InitVar[object]
    exclude: dataclasses.InitVar[object]
    buffers: dataclasses.InitVar[object]
    compensated: dataclasses.InitVar[bool]
    stochastic_rounding: dataclasses.InitVar[bool]
    seed: dataclasses.InitVar[int]
    on_nonfinite: dataclasses.InitVar[OnNonfinite]
    overlap: bool
    schedules: dict[str | None, Schedule] = dataclasses.field(init=False)
    home: torch.device | None = dataclasses.field(init=False)
    rules: Rules = dataclasses.field(init=False)
    precision: Precision = dataclasses.field(init=False)

    def __post_init__(  # noqa: PLR0917  # dataclasses pass all of these by position
        self,
        decay: object,
        device: object,
        include: object,
        exclude: object,
        buffers: object,
        compensated: bool,
        stochastic_rounding: bool,
        seed: int,
        on_nonfinite: OnNonfinite,
    ) -> None:
        schedules = schedules_by_name(decay)
        precision = Precision(
            compensated=compensated,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            on_nonfinite=on_nonfinite,
        )
        if self.dtype == torch.bfloat16:
            precision.check_narrow("dtype", schedules.values())
        checked = {
            "schedules": schedules,
            "update_after_step": _steps("update_after_step", self.update_after_step, 0),
            "update_every": _steps("update_every", self.update_every, 1),
            "dtype": _dtype(self.dtype),
            "home": _device(device),
            "rules": Rules.of(include, exclude, buffers),
            "precision": precision,
            "overlap": validate.boolean("overlap", self.overlap),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def schedule(self) -> Schedule:
        """The one schedule.

        Raises:
            StateError: there are several.
        """
        if None not in self.schedules:
            raise StateError(f"there are several averages, {listing(self.names)}: see `schedules`")
        return self.schedules[None]

    @property
    def names(self) -> list[str]:
        """The names of several averages; empty where there is one."""
        return [name for name in self.schedules if name is not None]

    @property
    def rounds(self) -> bool:
        """Whether averages are rounded stochastically."""
        return self.dtype == torch.bfloat16 and self.precision.stochastic_rounding

    @cached_property
    def depends_on_count(self) -> bool:
        """Whether an update of the same tensors depends on its number."""
        constant = all(type(each) is ConstantDecay for each in self.schedules.values())
        return self.rounds or not constant

    def index(self, name: str | None) -> int:
        """The index of the average that ``name`` chooses.

        Raises:
            ArgumentError: no average has this name, or there are several and none was given.
        """
        if name not in self.schedules:
            raise unknown_name(name, self.names)
        return list(self.schedules).index(name)

    def timing(self, name: str | None = None) -> dict[str, Any]:
        """When and how much is averaged, of one average or of all: fields of a ``Record``."""
        several: Any = self.schedules
        return {
            "schedule": several.get(name, several),
            "update_after_step": self.update_after_step,
            "update_every": self.update_every,
        }

    def differing(
        self, record: Record, name: str | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The timing of a record and of these settings where they differ, as plain values.

        Args:
            record: of the average of this name, or of all; None in it is not known.
            name: of the average.
        """
        several = name is None and bool(self.names)
        ours = self.timing(name)
        theirs = {field: getattr(record, field) for field in ours}
        differ = [
            field
            for field in ("update_after_step", "update_every")
            if theirs[field] is not None and theirs[field] != ours[field]
        ]
        if not self._has_schedules(theirs["schedule"], name):
            differ.insert(0, "schedule")
        for timing in (ours, theirs):
            timing["schedule"] = describe_schedules(timing["schedule"], several=several)
        return {field: theirs[field] for field in differ}, {field: ours[field] for field in differ}

    def _has_schedules(self, described: Any, name: str | None) -> bool:
        if name is not None or not self.names:
            return same_description(described, self.schedules[name])
        theirs = described or {}
        return all(
            same_description(theirs.get(label), schedule)
            for label, schedule in self.schedules.items()
        )


def _steps(name: str, value: object, minimum: int) -> int:
    return validate.integer(name, value, minimum, bits=63)


def _dtype(dtype: object) -> torch.dtype | None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(f"`dtype` must be a dtype, got {shown(dtype)}")
    if dtype is not None:
        check_dtype("dtype", str(dtype).removeprefix("torch."))
    return dtype


def _device(device: object) -> torch.device | None:
    if device is None:
        return None
    if not isinstance(device, (str, int, torch.device)) or isinstance(device, bool):
        raise ArgumentTypeError(f"`device` must be a torch.device, got {device!r}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"`device` must name a device, got {device!r}: {error}") from None
