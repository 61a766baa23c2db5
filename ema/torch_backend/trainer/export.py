"""Write averaged weights as a complete model that does not need this library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ema.errors import ArgumentTypeError, ModelError
from ema.schedule_descriptions import describe_schedule
from ema.torch_backend.model import EMAModel
from ema.torch_backend.tensors.names import unwrap

__all__ = ["NOTE", "processing_class_of", "save_pretrained"]

NOTE = "ema.json"
"""File beside the weights that describes the average."""


def processing_class_of(
    processing_class: Any = None, train_dataloader: Any = None, **_: Any
) -> Any:
    """The processing class that the Trainer puts into its checkpoints beside the model, or None.

    Args:
        processing_class: the Trainer's processing class, under the name that events use.
        train_dataloader: the Trainer's data loader. Without a processing class the Trainer
            saves the tokenizer of its data collator.
    """
    if processing_class is None:
        collator = getattr(train_dataloader, "collate_fn", None)
        # a collator that removes columns wraps another collator
        collator = getattr(collator, "data_collator", collator)
        processing_class = getattr(collator, "tokenizer", None)
    # the Trainer itself needs the method only when it saves
    return processing_class if hasattr(processing_class, "save_pretrained") else None


def save_pretrained(
    average: EMAModel[Any],
    model: nn.Module,
    folder: str | Path,
    *,
    processing_class: Any = None,
    **options: Any,
) -> None:
    """Write ``model`` with averaged weights, as its own ``save_pretrained`` writes it.

    The files hold all that ``save_pretrained`` saves: tied and frozen weights, buffers and the
    shards of a large model. For a PEFT model they hold the adapter. If the model is sharded, every
    rank must call this; rank 0 gathers the tensors in CPU memory and writes them. A note in
    ``ema.json`` holds decay, step and schedule.

    Args:
        average: the average of the model.
        model: a transformers, diffusers or PEFT model, wrapped or not.
        folder: where to write; it is created if needed.
        processing_class: a tokenizer or processor to write beside the model, or None.
        **options: options of the model's ``save_pretrained``.

    Raises:
        ArgumentTypeError: the model or ``processing_class`` has no ``save_pretrained``.
        ModelError: the average does not fit ``model``.
    """
    inner: Any = unwrap(model)
    if not hasattr(inner, "save_pretrained"):
        raise ArgumentTypeError(
            f"`model` must have save_pretrained, got {type(inner).__name__}:"
            " EMAModel.export writes any module"
        )
    if processing_class is not None and not hasattr(processing_class, "save_pretrained"):
        raise ArgumentTypeError(
            f"`processing_class` must have save_pretrained, got {type(processing_class).__name__}"
        )
    if not average.sharded:
        with average.use_ema(model):
            inner.save_pretrained(folder, **options)
        _write_beside(folder, average, processing_class)
        return
    if id(unwrap(average.model)) != id(inner):
        raise ModelError("a sharded average can only be written with its own model")
    if state := average.averaged_state_dict():
        inner.save_pretrained(folder, state_dict=state, **options)
        _write_beside(folder, average, processing_class)


def _write_beside(folder: str | Path, average: EMAModel[Any], processing_class: Any) -> None:
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    note = {
        "weights": "ema",
        "decay": _decay_of(average),
        "schedule": describe_schedule(average.schedule),
        "step": average.step,
        "count": average.count,
    }
    (Path(folder) / NOTE).write_text(json.dumps(note, indent=2) + "\n")


def _decay_of(average: EMAModel[Any]) -> float | None:
    """The decay of the last update, or None if a schedule of the user's own cannot give it."""
    try:
        return average.decay
    except Exception:  # writing must not fail because of a schedule
        return None
