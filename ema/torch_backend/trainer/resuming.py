"""Load the average of the checkpoint that a run resumes from, or of the best checkpoint."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState, TrainingArguments

from ema.checkpoint import open_state
from ema.errors import CheckpointError, warn
from ema.torch_backend.trainer.checkpoints import Checkpoints
from ema.torch_backend.trainer.run_average import RunAverage
from ema.torch_backend.trainer.run_folder import (
    belongs_to,
    checkpoint_folder,
    file_name,
    is_incomplete,
    is_there,
)

__all__ = ["Resuming"]


class Resuming:
    """Finds the average in a checkpoint and loads it.

    Args:
        run: the average, which takes over the loaded state.
        checkpoints: keeps the metadata of the loaded file.
        name: the name of the callback, or None.
        missing_is_error: whether a checkpoint without an average is an error; else a warning.
    """

    def __init__(
        self, run: RunAverage, checkpoints: Checkpoints, name: str | None, *, missing_is_error: bool
    ) -> None:
        self._run = run
        self._checkpoints = checkpoints
        self._file = file_name(name)
        self._missing_is_error = missing_is_error

    def resume(self, args: TrainingArguments, state: TrainerState, told: Path | None) -> None:
        """Load the average of the checkpoint that training resumes from.

        Args:
            args: the Trainer's arguments.
            state: the Trainer's state.
            told: the checkpoint, if an attached Trainer has named it.

        Raises:
            CheckpointError: the checkpoint has no average, and ``missing_is_error`` is set.
        """
        otherwise = (
            f"training goes on from step {state.global_step} and the average starts anew from the"
            " weights of that step"
        )
        if told is not None:
            self.load_from(told, otherwise)
            return
        folder = Path(args.resume_from_checkpoint or checkpoint_folder(args, state))
        otherwise += (
            ". The Trainer does not tell a callback which checkpoint it resumes from:"
            " attach(trainer) finds it in any folder, or call load_ema_state before train() to"
            " continue from a saved state"
        )
        if belongs_to(folder, state):
            self.load_from(folder, otherwise)
        else:
            self._miss(f"{folder} is not the checkpoint that training goes on from: {otherwise}")

    def load_from(self, folder: Path, otherwise: str) -> None:
        """Load the average of this checkpoint; ``otherwise`` says what happens if there is none."""
        file = folder / self._file
        if is_incomplete(folder):
            self._miss(
                f"{folder} is incomplete, because the Trainer was interrupted while it saved there:"
                " last_complete_checkpoint finds the latest complete one"
            )
        if is_there(file):
            self._run.ema_model.load(file)
            self._checkpoints.notes = open_state(file).record.extra
        else:
            self._miss(f"there is no average in {folder} ({file.name}): {otherwise}")

    def _miss(self, message: str) -> None:
        if self._missing_is_error:
            raise CheckpointError(message)
        warn(message)
