"""What ``EMAModel`` and ``EMACallback`` are told, checked once and in one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from ema import validate
from ema.errors import ArgumentError, ArgumentTypeError, StateError, listing
from ema.precision import Precision
from ema.schedule_descriptions import describe_schedule, same_description
from ema.schedules import ConstantDecay, Schedule, as_schedule
from ema.torch_backend.tensors.selection import Rules

__all__ = ["Settings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of :class:`EMAModel`, which documents them, as they are used.

    Raises:
        ArgumentError: one of them is out of range.
        ArgumentTypeError: one of them has the wrong type.
    """

    schedules: dict[str | None, Schedule]
    update_after_step: int
    update_every: int
    dtype: torch.dtype | None
    device: torch.device | None
    rules: Rules
    precision: Precision
    overlap: bool

    @classmethod
    def of(
        cls,
        *,
        decay: object,
        update_after_step: object,
        update_every: object,
        dtype: object,
        device: object,
        include: object,
        exclude: object,
        buffers: object,
        compensated: Any,
        stochastic_rounding: Any,
        seed: Any,
        on_nonfinite: Any,
        overlap: object,
    ) -> Settings:
        """Check the arguments of the constructor."""
        schedules = _schedules(decay)
        precision = Precision(
            compensated=compensated,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            on_nonfinite=on_nonfinite,
        )
        if dtype == torch.bfloat16:
            precision.check_narrow("dtype", schedules.values())
        return cls(
            schedules=schedules,
            update_after_step=validate.integer("update_after_step", update_after_step, 0, bits=63),
            update_every=validate.integer("update_every", update_every, 1, bits=63),
            dtype=_dtype(dtype),
            device=_device(device),
            rules=Rules.of(include, exclude, buffers),
            precision=precision,
            overlap=validate.boolean("overlap", overlap),
        )

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
        """Whether averages are rounded by chance."""
        return self.dtype == torch.bfloat16 and self.precision.stochastic_rounding

    @cached_property
    def depends_on_count(self) -> bool:
        """Whether an update is another one than that before it, for the same tensors."""
        constant = all(type(each) is ConstantDecay for each in self.schedules.values())
        return self.rounds or not constant

    def index(self, name: str | None) -> int:
        """Which average a name means.

        Raises:
            ArgumentError: there is none of that name, or there are several and none was given.
        """
        if name not in self.schedules:
            rule = (
                f"be one of {listing(self.names)}" if self.names else "not be given for one average"
            )
            raise ArgumentError(f"`name` must {rule}, got {name!r}")
        return list(self.schedules).index(name)

    def timing(self, name: str | None = None) -> dict[str, Any]:
        """When and how much is averaged, of one average or of all, as plain values for a state."""
        plain = {name: describe_schedule(schedule) for name, schedule in self.schedules.items()}
        return {
            "schedule": plain.get(name, plain),
            "update_after_step": self.update_after_step,
            "update_every": self.update_every,
        }

    def differing(self, state: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
        """What :meth:`timing` of a state says where that is not what these settings say.

        Args:
            state: of the average of this name, or of all.
            name: of the average.
        """
        ours = self.timing(name)
        same = {key: state[key] == ours[key] for key in ours if key != "schedule"}
        same["schedule"] = self._has_schedules(state["schedule"], name)
        return {key: state[key] for key in ours if not same[key]}

    def _has_schedules(self, described: Any, name: str | None) -> bool:
        if name is not None or not self.names:
            return same_description(described, self.schedules[name])
        theirs = described or {}
        return all(
            same_description(theirs.get(label), schedule)
            for label, schedule in self.schedules.items()
        )


def _schedules(decay: object) -> dict[str | None, Schedule]:
    if not isinstance(decay, Mapping):
        return {None: as_schedule(decay)}
    if not decay:
        raise ArgumentError(f"`decay` must name at least one average, got {decay!r}")
    for name in decay:
        if not isinstance(name, str) or not name:
            raise ArgumentTypeError(f"`decay` must name averages by strings, got {name!r}")
    return {name: as_schedule(each, f"decay[{name!r}]") for name, each in decay.items()}


def _dtype(dtype: object) -> torch.dtype | None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(f"`dtype` must be a torch.dtype, got {dtype!r}")
    if dtype not in {None, torch.float32, torch.float64, torch.bfloat16}:
        raise ArgumentError(
            "`dtype` must be torch.float32, torch.float64 or torch.bfloat16 (rounded"
            f" stochastically), got {dtype}"
        )
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
