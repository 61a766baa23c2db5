"""Averaged weights as a model of their own that needs this library no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ema.errors import ArgumentTypeError, ModelError
from ema.schedule_descriptions import describe_schedule
from ema.torch_backend.model import EMAModel
from ema.torch_backend.names import unwrap

__all__ = ["NOTE", "save_pretrained"]

NOTE = "ema.json"
"""File beside the weights that says what they are."""


def save_pretrained(
    average: EMAModel[Any], model: nn.Module, folder: str | Path, **options: Any
) -> None:
    """Write ``model`` with averaged weights, as its own ``save_pretrained`` writes it.

    Everything that it saves is there: tied and frozen weights, buffers, shards of a large model; of
    a PEFT model the adapter. Where the model is sharded every rank must call this; rank 0 gathers
    the tensors in memory of the CPU and writes them. A note in ``ema.json`` holds decay, step and
    schedule.

    Args:
        average: of the model.
        model: a transformers, diffusers or PEFT model, wrapped or not.
        folder: is created where needed.
        **options: for the model's ``save_pretrained``.

    Raises:
        ArgumentTypeError: the model has no ``save_pretrained``.
        ModelError: the average does not fit it.
    """
    inner: Any = unwrap(model)
    if not hasattr(inner, "save_pretrained"):
        raise ArgumentTypeError(
            f"`model` must have save_pretrained, which {type(inner).__name__} has not:"
            " EMAModel.export writes any module"
        )
    if not average.sharded:
        with average.use_ema(model):
            inner.save_pretrained(folder, **options)
        _write_note(average, folder)
        return
    if id(unwrap(average.model)) != id(inner):
        raise ModelError("a sharded average can only be written with the model that it belongs to")
    if state := average.averaged_state_dict():
        inner.save_pretrained(folder, state_dict=state, **options)
        _write_note(average, folder)


def _write_note(average: EMAModel[Any], folder: str | Path) -> None:
    note = {
        "weights": "ema",
        "decay": _decay_of(average),
        "schedule": describe_schedule(average.schedule),
        "step": average.step,
        "count": average.count,
    }
    (Path(folder) / NOTE).write_text(json.dumps(note, indent=2) + "\n")


def _decay_of(average: EMAModel[Any]) -> float | None:
    """The decay of the last update, or None where a schedule of the user's own does not say."""
    try:
        return average.decay
    except Exception:  # writing must not fail because of a schedule
        return None
