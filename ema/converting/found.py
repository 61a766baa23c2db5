"""The average that was found in a source of another library."""

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


_COUNTING = ("I", "U", "BOOL")  # such as the counter that AveragedModel has beside its module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """An average of another library, in our terms.

    Attributes:
        kind: what wrote it.
        tensors: by name, or a list where the source has no names.
        name: of the average, where the source has one for it.
        told: fields of a :class:`~ema.checkpoint.Record` that the source tells.
        remainders: of compensated averages, by the names of those.
        notes: what the user should know of how it was read.
        at_users_word: nothing in the source says that these are averages.
        left_out: names of what is in the source beside the averages.
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
    """The same without ``module.`` and ``_orig_mod.`` where all names begin so.

    DDP and ``torch.compile`` put them there; the names of the model that is wrapped lack them.
    """
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
        notes=(*found.notes, f"all names began with `{prefix}`, which was left out"),
    )


def check_size(size: int, most: int) -> None:
    """Refuse what is larger than a file of its size lets one expect.

    Raises:
        CheckpointError: it is.
    """
    if size > most:
        raise CheckpointError(
            f"its tensors take {size:,} bytes, {most:,} are allowed for a file of that size:"
            f" max_bytes={size} (--max-bytes) allows them"
        )


def counters(beside: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and updates by the counters that programs keep beside an average.

    A counter of the average's own (``num_updates``) counts its updates; ``step`` is the program's.
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
    """Steps and schedule of the ``LitEma`` of latent diffusion.

    Its decay after ``num_updates`` n is ``min(decay, (1 + n) / (10 + n))``; where it does not count,
    n is −1 and the decay constant.
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
        raise CheckpointError(f"the state of LitEma is wrong: {error}") from None


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
        else:  # no schedule of ours has a min_decay above its first decay
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
    """A count, also out of a tensor or array of one element."""
    if hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"`{name}` must be a count, got {value!r:.80}")
    return value
