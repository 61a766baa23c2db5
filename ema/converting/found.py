"""What a source of another library turned out to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ema.checkpoint import Source
from ema.errors import CheckpointError, EMAError
from ema.schedules import InverseGammaWarmup, RampWarmup, Schedule

__all__ = ["Found", "diffusers_fields"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """An average of another library, in our terms; None is what it does not tell.

    Attributes:
        kind: what wrote it.
        tensors: by name, or a list where the source has no names.
        name: of the average, where the source has one for it.
        step: steps so far.
        count: updates so far.
        schedule: of ours that gives the same decays, or the description of another one.
        update_after_step: likewise.
        update_every: likewise.
        not_averaged: names of parameters that the source says are not averaged.
        remainders: of compensated averages, by the names of those.
        skipped: updates that were due and not made.
        seed: of stochastic rounding.
        metadata: notes of the source.
        notes: what the user should know of the choice that was made.
    """

    kind: str
    tensors: dict[str, Source] | list[Source]
    name: str | None = None
    step: int | None = None
    count: int | None = None
    schedule: Schedule | Mapping[str, Any] | None = None
    update_after_step: int | None = None
    update_every: int | None = None
    not_averaged: tuple[str, ...] = ()
    remainders: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    skipped: int | None = None
    seed: int | None = None
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def diffusers_fields(state: Mapping[str, Any]) -> dict[str, Any]:
    """Step and schedule of a diffusers ``EMAModel``, which copies at its first update.

    Its decay at ``optimization_step`` is that of our count ``optimization_step −
    update_after_step − 1``.
    """
    step = whole("optimization_step", state.get("optimization_step"))
    after = whole("update_after_step", state.get("update_after_step", 0)) + 1
    schedule: Schedule | None
    try:
        if state.get("use_ema_warmup"):
            schedule = InverseGammaWarmup(
                decay=state["decay"],
                inv_gamma=state["inv_gamma"],
                power=state["power"],
                min_decay=state["min_decay"],
            )
        else:  # a min_decay above its first decay is no schedule of ours
            schedule = RampWarmup(decay=state["decay"]) if state["min_decay"] <= 2 / 11 else None
    except (KeyError, TypeError, EMAError) as error:
        raise CheckpointError(f"this is no state of diffusers' EMAModel: {error}") from None
    return {
        "step": step,
        "count": max(0, step - after),
        "schedule": schedule,
        "update_after_step": after,
        "update_every": 1,
    }


def whole(name: str, value: Any) -> int:
    """A count, also out of a tensor or array of one element."""
    if hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"`{name}` must be a count, got {value!r:.80}")
    return value
