"""What ``EMAModel`` and ``EMACallback`` are told, checked once and in one place."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ema import validate
from ema.errors import ArgumentError, ArgumentTypeError
from ema.schedules import Schedule, as_schedule
from ema.torch_backend.selection import Rules

__all__ = ["Settings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of :class:`EMAModel`, which documents them, as they are used.

    Raises:
        ArgumentError: one of them is out of range.
        ArgumentTypeError: one of them has the wrong type.
    """

    schedule: Schedule
    update_after_step: int
    update_every: int
    dtype: torch.dtype | None
    device: torch.device | None
    rules: Rules

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
    ) -> Settings:
        """Check the arguments of the constructor."""
        return cls(
            schedule=as_schedule(decay),
            update_after_step=validate.integer("update_after_step", update_after_step, minimum=0),
            update_every=validate.integer("update_every", update_every, minimum=1),
            dtype=_dtype(dtype),
            device=_device(device),
            rules=Rules.of(include, exclude, buffers),
        )

    def timing(self) -> dict[str, Any]:
        """When and how much is averaged, as plain values for a state."""
        return {
            "schedule": self.schedule.to_dict(),
            "update_after_step": self.update_after_step,
            "update_every": self.update_every,
        }


def _dtype(dtype: object) -> torch.dtype | None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ArgumentTypeError(f"`dtype` must be a torch.dtype, got {dtype!r}")
    if dtype not in (None, torch.float32, torch.float64):
        raise ArgumentError(
            f"`dtype` must be torch.float32 or torch.float64, got {dtype}: a narrower average"
            " does not move at decays near 1"
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
