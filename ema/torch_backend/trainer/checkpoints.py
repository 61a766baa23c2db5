"""Write the average into every checkpoint of a run, announced or not.

A checkpoint is named after a step, and holds the average of that step. The Trainer usually saves
after every callback has seen the end of the step, and announces the checkpoint with ``on_save``. It
also saves on SIGTERM (``enable_jit_checkpoint``) and when another callback asks it to. Such a save
can fall into the middle of any event, before or after the update of the step, and sends no event.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ema.errors import warn
from ema.torch_backend.trainer.evaluation import live_weights
from ema.torch_backend.trainer.run_average import RunAverage
from ema.torch_backend.trainer.run_folder import checkpoint_folder, discard, file_name, list_files
from ema.torch_backend.trainer.skipped import SkippedSteps
from ema.torch_backend.trainer.unannounced import UnannouncedSaves

__all__ = ["Checkpoints", "wait_for_everyone"]


class Checkpoints:
    """Keeps the average in step with the run, and writes it into the run's checkpoints.

    Attributes:
        notes: metadata of the file that the run resumed from; every file of the run keeps it.

    Args:
        run: the average.
        name: the name of the callback, or None.
    """

    def __init__(self, run: RunAverage, name: str | None) -> None:
        self.notes: Mapping[str, str] = {}
        self._run = run
        self._file = file_name(name)
        self._skipped = SkippedSteps()
        self._unannounced = UnannouncedSaves()
        self._warned = False
        self.forget()

    def forget(self) -> None:
        """Forget the run, because another run begins; its average follows with :meth:`begin`."""
        self._followed: int | None = None  # the step whose weights the average has seen
        self._ahead: int | None = None  # the step that was updated early, for a save
        self._written: int | None = None  # the step whose checkpoint has its average, from `saved`
        self._waiting: Path | None = None  # a checkpoint that was saved before the average began

    def follows(self, model: Any) -> bool:
        """Whether the average belongs to a run that has trained ``model``."""
        return self._followed is not None and self._run.ema_model.model is model

    def begin(self, args: TrainingArguments, state: TrainerState) -> None:
        """Start with an average that is up to date with ``state.global_step``."""
        self._skipped.forget()
        self._warned = False
        self._unannounced.begin(args, state)
        self._followed, self._ahead, self._written = state.global_step, None, None
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._write_together(args, waiting)

    def before_step(self, optimizer: Any) -> None:
        """Remember the scale of the gradients before the step, if there is one."""
        self._skipped.before(optimizer)

    def follow(self, step: int, optimizer: Any) -> None:
        """Update after an optimizer step, unless a save has made this update already."""
        if self._ahead != step:
            self._update(optimizer)
        self._followed, self._ahead = step, None

    def expect(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Prepare for a possible save: discard the file that another run left in the folder."""
        may_save = control.should_save or (
            control.should_evaluate and args.save_strategy == SaveStrategy.BEST
        )
        if may_save and args.should_save and not state.is_hyper_param_search:
            discard(checkpoint_folder(args, state) / self._file)

    def saving(self, args: TrainingArguments, folder: Path, step: int, optimizer: Any) -> None:
        """Make the update of the step, if it is due, before its checkpoint is written."""
        if self._followed is not None and step > self._followed:
            self._update(optimizer)
            self._followed = self._ahead = step
        if args.should_save:
            discard(folder / self._file)

    def saved(self, args: TrainingArguments, folder: Path, step: int) -> None:
        """Write the average into a checkpoint that was just saved."""
        if self._followed is None:
            self._waiting = folder
            return
        self._write_together(args, folder)
        self._written = step

    def announced(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the average into the checkpoint that ``on_save`` announces, as its last file."""
        if self._written == state.global_step:
            return
        wait_for_everyone()  # each process writes the state of its random numbers
        folder = checkpoint_folder(args, state)
        self._write(args, folder)
        self._unannounced.settle(state, folder)

    def complete(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Write the average into checkpoints of its step that were saved without ``on_save``.

        If there are several processes, the others may still be writing their files. They are all at
        the same event only after a save on SIGTERM, because the Trainer then ends training.
        """
        if self._followed is None:
            return
        if _several() and not (args.enable_jit_checkpoint and control.should_training_stop):
            self._warn_if_unannounced(state)
            return
        wait_for_everyone()
        for folder in self._agreed(self._unannounced.find(args, state, self._followed)):
            if args.should_save:
                discard(folder / self._file)  # another run left it
            self._write(args, folder)
            self._unannounced.know(folder)
        if self._followed == state.global_step:
            self._unannounced.settle(state)

    def _update(self, optimizer: Any) -> None:
        if not self._skipped.skipped(optimizer):
            average = self._run.ema_model
            with live_weights(average.model):
                average.update()

    def _write_together(self, args: TrainingArguments, folder: Path) -> None:
        """Write into a folder, if it exists: a Trainer may leave the saving to another process."""
        wait_for_everyone()
        for there in self._agreed([folder] if folder.is_dir() else []):
            self._write(args, there)

    def _write(self, args: TrainingArguments, folder: Path) -> None:
        average = self._run.ema_model
        # without shards every process holds the same average, and one writes it
        if args.should_save or average.sharded:
            average.save(folder / self._file, metadata={**self.notes, **list_files(folder)})

    def _agreed(self, folders: list[Path]) -> list[Path]:
        """The folders that rank 0 sees, if all ranks write together; else those of this rank."""
        if not (_several() and self._run.ema_model.sharded):
            return folders
        agreed: list[Any] = [folders]
        dist.broadcast_object_list(agreed)
        return list(agreed[0])

    def _warn_if_unannounced(self, state: TrainerState) -> None:
        if self._unannounced.any(state) and not self._warned:
            self._warned = True
            warn(
                f"a checkpoint of step {state.global_step} was saved without an event: with several"
                " processes only an attached callback writes its average, so call attach(trainer)"
            )


def wait_for_everyone() -> None:
    """If there are several processes, wait until all of them have arrived here."""
    if _several():
        dist.barrier()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
