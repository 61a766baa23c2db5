"""The average that was found in a source, in this library's terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ema.checkpoint import Source
from ema.converting.trees import without_shared_prefixes
from ema.errors import CheckpointError, EMAError
from ema.schedules import ConstantDecay, InverseGammaWarmup, RampWarmup, Schedule

__all__ = [
    "Found",
    "check_size",
    "counters",
    "diffusers_fields",
    "lit_ema_fields",
    "stripped",
    "whole",
]


_COUNTING = ("I", "U", "BOOL")  # such as the counter of AveragedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """An average of another library, in this library's terms.

    Attributes:
        kind: the library or function that wrote it.
        tensors: the averages by name, or a list if the source has no names.
        name: the name of the average, if the source names it.
        told: the fields of a :class:`~ema.checkpoint.Record` that the source contains.
        remainders: the remainders of a compensated average, by name.
        notes: what the user should know about how the source was read.
        at_users_word: only the user says that these are averages; the source does not.
        left_out: names of other things in the source.
    """

    kind: str
    tensors: dict[str, Source] | list[Source]
    name: str | None = None
    told: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    remainders: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    at_users_word: bool = False
    left_out: tuple[str, ...] = ()


def stripped(found: Found) -> Found:
    """Remove ``module.`` and ``_orig_mod.``, with which DDP and ``torch.compile`` begin all names."""
    if not isinstance(found.tensors, dict):
        return found
    weights = [
        name for name, tensor in found.tensors.items() if not tensor.dtype.startswith(_COUNTING)
    ]
    _, prefix = without_shared_prefixes(weights)
    if not prefix:
        return found
    return dataclasses.replace(
        found,
        tensors={name.removeprefix(prefix): tensor for name, tensor in found.tensors.items()},
        notes=(*found.notes, f"all names began with `{prefix}`, which was removed"),
    )


def check_size(size: int, most: int) -> None:
    """Refuse tensors that are suspiciously large for their file.

    Raises:
        CheckpointError: ``size`` exceeds ``most``.
    """
    if size > most:
        raise CheckpointError(
            f"its tensors take {size:,} bytes, {most:,} are allowed for a file of this size:"
            f" max_bytes={size} (--max-bytes) allows them"
        )


def counters(beside: Mapping[str, Any]) -> dict[str, Any]:
    """Read steps and updates from the counters that programs keep beside an average.

    A counter such as ``num_updates`` counts updates of the average. A counter such as ``step`` counts
    training steps.
    """
    for name in ("num_updates", "updates", "n_updates", "ema_step", "optimization_step"):
        if name in beside and (value := _count(beside[name])) is not None:
            return {"step": value, "count": value}
    for name in ("step", "global_step", "train_steps", "iteration"):
        if name in beside and (value := _count(beside[name])) is not None:
            return {"step": value}
    return {}


def _count(value: Any) -> int | None:
    try:
        return whole("counter", value)
    except CheckpointError:
        return None


def lit_ema_fields(beside: Mapping[str, Any]) -> dict[str, Any]:
    """Read steps and schedule of latent diffusion's ``LitEma``.

    Its decay after ``num_updates`` n is ``min(decay, (1 + n) / (10 + n))``. If n is −1, it does not count
    updates and the decay is constant.
    """
    if not {"decay", "num_updates"} <= beside.keys():
        return {}
    decay, updates = beside["decay"], beside["num_updates"]
    decay = float(
        np.format_float_positional(np.float32(decay), unique=True)
    )  # 0.9999, not 0.99989998
    try:
        if updates == -1:
            return {"schedule": ConstantDecay(decay=decay)}
        step = whole("num_updates", updates)
        return {"step": step, "count": step, "schedule": RampWarmup(decay=decay)}
    except EMAError as error:
        raise CheckpointError(f"the state of LitEma is invalid: {error}") from None


def diffusers_fields(state: Mapping[str, Any]) -> dict[str, Any]:
    """Read step and schedule of a diffusers ``EMAModel``, whose first update copies the weights.

    Its decay at ``optimization_step`` is this library's decay at count ``optimization_step −
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
        else:  # RampWarmup starts at 2/11: it cannot express a higher min_decay
            schedule = RampWarmup(decay=state["decay"]) if state["min_decay"] <= 2 / 11 else None
    except (KeyError, TypeError, EMAError) as error:
        raise CheckpointError(f"this is not a state of diffusers' EMAModel: {error}") from None
    return {
        "step": step,
        "count": max(0, step - after),
        "schedule": schedule,
        "update_after_step": after,
        "update_every": 1,
    }


def whole(name: str, value: Any) -> int:
    """Convert a count to an integer, also from a tensor or array of one element.

    Raises:
        CheckpointError: the value is not a count.
    """
    if hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"`{name}` must be a count, got {value!r:.80}")
    return value
