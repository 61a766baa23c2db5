"""Find checkpoints that the Trainer has written without sending an event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ema.torch_backend.trainer.run_folder import checkpoint_folders, output_folder

__all__ = ["UnannouncedSaves"]


class UnannouncedSaves:
    """Detects in memory that a checkpoint was saved, and only then searches the output folder.

    Each save replaces the entry of ``TrainerControl`` in the state that it writes. A checkpoint in
    the output folder belongs to this run if its ``trainer_state.json`` is new or has changed since
    the run began.
    """

    def __init__(self) -> None:
        self._entry: Any = None
        self._known: dict[Path, int] = {}  # for each folder: the time when its state was written

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Start with a run that has saved no checkpoint yet."""
        self._entry = _entry(state)
        self._known = {}
        if args.should_save:
            for folder in _checkpoints(args, state):
                self.know(folder)

    def any(self, state: TrainerState) -> bool:
        """Whether this process has saved a checkpoint since the last :meth:`settle`."""
        return _entry(state) is not self._entry

    def find(self, args: TrainingArguments, state: TrainerState, step: int) -> list[Path]:
        """Checkpoints of this step that were saved and are not known yet."""
        if not self.any(state):
            return []
        return [
            folder
            for folder in checkpoint_folders(args, state, step)
            if (time := _time(folder)) is not None and time != self._known.get(folder)
        ]

    def know(self, folder: Path) -> None:
        """Mark this checkpoint as known: it has its average, or another run wrote it."""
        if (time := _time(folder)) is not None:
            self._known[folder] = time

    def settle(self, state: TrainerState, folder: Path | None = None) -> None:
        """Mark all saves so far as known."""
        self._entry = _entry(state)
        if folder is not None:
            self.know(folder)


def _entry(state: TrainerState) -> Any:
    entries: Any = state.stateful_callbacks  # it is a dict, although its annotation differs
    return entries.get(TrainerControl.__name__) if entries else None


def _checkpoints(args: TrainingArguments, state: TrainerState) -> Iterator[Path]:
    yield from output_folder(args).glob("checkpoint-*")
    if state.is_hyper_param_search:
        yield from output_folder(args).glob("*/checkpoint-*")


def _time(folder: Path) -> int | None:
    with suppress(OSError):
        return (folder / TRAINER_STATE_NAME).stat().st_mtime_ns
    return None
