"""The course of a run: what happens to the average and its checkpoints from event to event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ema.torch_backend.trainer import advice
from ema.torch_backend.trainer.attachment import Attachment
from ema.torch_backend.trainer.checkpoints import Checkpoints, wait_for_everyone
from ema.torch_backend.trainer.evaluation import EvaluationSwap, live_weights
from ema.torch_backend.trainer.optimizer_modes import RunOptimizer
from ema.torch_backend.trainer.resuming import Resuming
from ema.torch_backend.trainer.run_average import RunAverage

__all__ = ["Course"]


class Course:
    """Keeps the average and its checkpoints in step with one run after the other.

    Args:
        run: the average.
        evaluation: swaps the average in for the evaluations of the run.
        name: the name of the callback, or None.
        missing_is_error: whether a checkpoint without an average is an error; else a warning.

    Attributes:
        attachment: the wrapped methods of the attached Trainer, or None.
        checkpoints: writes the average into the checkpoints of the run.
    """

    def __init__(
        self,
        run: RunAverage,
        evaluation: EvaluationSwap,
        name: str | None,
        *,
        missing_is_error: bool,
    ) -> None:
        self.attachment: Attachment | None = None
        self.checkpoints = Checkpoints(run, name)
        self._run = run
        self._evaluation = evaluation
        self._resuming = Resuming(run, self.checkpoints, name, missing_is_error=missing_is_error)
        self._optimizer = RunOptimizer()
        self._batch_size: int | None = None  # while a run trains

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers that may rewrite the live weights while averages are in the model."""
        attached = None if self.attachment is None else self.attachment.optimizer
        return [self._optimizer.get(), attached]

    def begin(
        self, args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Any
    ) -> None:
        """Start the average, or continue the one that was saved or loaded."""
        self._evaluation.end()
        self._optimizer.set(optimizer)
        self.checkpoints.notes = {}
        smaller = self._batch_size is not None and self._batch_size != state.train_batch_size
        self._batch_size = state.train_batch_size
        with live_weights(model):
            go_on = self._run.begin(
                model,
                again=args.auto_find_batch_size and smaller,
                may_begin_again=args.auto_find_batch_size,
            )
            if state.global_step > 0 and not go_on:
                told = None if self.attachment is None else self.attachment.resumed_from
                self._resuming.resume(args, state, told)
        self.checkpoints.begin(args, state)
        advice.on_slow_decay(self._run.settings, state.max_steps)

    def begin_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Make sure that training uses the live weights."""
        self._evaluation.end()
        self.complete(args, state, control)
        advice.on_step_beyond_the_last(state)

    def before_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any
    ) -> None:
        """Remember the scale of the gradients before the step, if there is one."""
        self.complete(args, state, control)
        self.checkpoints.before_step(optimizer)

    def follow(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any
    ) -> None:
        """Update after an optimizer step, unless the gradient scaler skipped it."""
        self.complete(args, state, control)  # checkpoints of the step before
        self.checkpoints.follow(state.global_step, optimizer)
        self.complete(args, state, control)
        self.checkpoints.expect(args, state, control)

    def end_epoch(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Prepare for a save at the end of the epoch."""
        self._evaluation.end()
        self.complete(args, state, control)
        self.checkpoints.expect(args, state, control)

    def save(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the average into the checkpoint that was just saved, as its last file."""
        self._evaluation.end()
        self.checkpoints.announced(args, state)

    def complete(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Complete checkpoints, unless the wrapped methods of an attached Trainer do it."""
        if not self._serves_attached():
            self.checkpoints.complete(args, state, control)

    def arm_evaluation(self) -> None:
        """Prepare for an evaluation, unless the wrapped methods of an attached Trainer do it."""
        if not self._serves_attached():
            self._evaluation.arm(self._run.ema_model, self._optimizer)

    def end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        best_is_averaged: bool,
    ) -> None:
        """Complete the last checkpoint, and keep the best average where the best model is kept.

        Args:
            args: the Trainer's arguments.
            state: the Trainer's state.
            control: the Trainer's control.
            best_is_averaged: whether the average was evaluated to choose the best model.
        """
        self._evaluation.end()
        self._batch_size = None
        self.complete(args, state, control)
        advice.on_no_update(self._run.ema_model, self._run.settings)
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best_is_averaged and best is not None:
            wait_for_everyone()  # the main process may still be writing the average of this step
            self._resuming.load_from(Path(best), "the last average is kept")

    def _serves_attached(self) -> bool:
        """Whether the Trainer that trains now is the attached one."""
        return self.attachment is not None and self.attachment.trains
