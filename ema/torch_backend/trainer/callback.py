"""``EMACallback``: the average of a Hugging Face ``Trainer`` run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ema import validate
from ema.errors import ArgumentError, ArgumentTypeError, StateError, shown
from ema.options import OnNonfinite
from ema.schedules import Schedule
from ema.torch_backend.model import EMAModel
from ema.torch_backend.settings import Settings
from ema.torch_backend.trainer import advice
from ema.torch_backend.trainer.attachment import Attachment
from ema.torch_backend.trainer.claims import claim
from ema.torch_backend.trainer.course import Course
from ema.torch_backend.trainer.evaluation import EvaluationSwap, known_to_evaluate
from ema.torch_backend.trainer.export import processing_class_of, save_pretrained
from ema.torch_backend.trainer.optimizer_modes import Loan, applied
from ema.torch_backend.trainer.run_average import RunAverage
from ema.torch_backend.trainer.run_folder import file_name, model_folder

__all__ = ["EMACallback"]


class EMACallback(TrainerCallback):
    """Averages the weights of a ``Trainer`` run after every real optimizer step.

    Steps within a gradient accumulation and steps that the gradient scaler skipped do not count.
    Every ``train()`` starts with an average that equals the weights, unless it resumes from a
    checkpoint, or you loaded a state before. Each checkpoint of the run holds the average in
    ``ema.safetensors``, which is written last. A resumed run finds it.

    ``callbacks=[ema_callback]`` does everything that events allow. :meth:`attach` does the rest: it
    resumes from any folder, averages ``trainer.evaluate()`` and ``predict()`` outside of training,
    restores the live weights at once if an evaluation raises, and writes into the Trainer's logs.

    ``apply_ema``, ``restore_original``, ``get_ema_state`` and ``load_ema_state`` also work without a
    ``Trainer``, for instance in a new process.

    Args:
        decay: the decay of one update in [0, 1], or a schedule.
        update_after_step: through this step the average equals the live weights.
        update_every: optimizer steps from one update to the next.
        dtype: of all averages; see :class:`EMAModel` for this and all options down to ``overlap``.
        device: where the averages are kept.
        include: patterns of the parameters that are averaged.
        exclude: patterns of the parameters that are not averaged.
        buffers: ``"copy"``, ``"average"`` or a mapping from patterns to these.
        compensated: keep the rounding error of each update.
        stochastic_rounding: round bfloat16 averages up or down at random.
        seed: of the stochastic rounding.
        on_nonfinite: ``"propagate"``, ``"skip"`` or ``"raise"``, where live weights hold NaN or Inf.
        overlap: on a GPU, whether updates run beside the training step.
        eval_with_ema: whether evaluations see the averaged weights. Training continues with the
            live weights, and checkpoints hold these. With ``load_best_model_at_end`` the average at
            the end is the average that gave the best metric.
        save_ema_model: whether a complete averaged model is written to ``<output_dir>/ema`` (with
            a ``name`` to ``ema-<name>``) at the end of training, see :meth:`save_pretrained`.
        on_missing_average: ``"warn"`` or ``"error"``, for a checkpoint without an average.
        name: of this callback, if a Trainer has several; its file is ``ema-<name>.safetensors``.

    Raises:
        ArgumentError: an argument is out of range.
        ArgumentTypeError: an argument has the wrong type.

    Example::

        ema_callback = EMACallback(decay=0.999)
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[ema_callback])
        trainer.train()
        ema_callback.apply_ema(model)
    """

    def __init__(
        self,
        decay: float | Schedule = 0.999,
        *,
        update_after_step: int = 0,
        update_every: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        include: str | Collection[str] | None = None,
        exclude: str | Collection[str] | None = None,
        buffers: str | Mapping[str, str] = "copy",
        compensated: bool = False,
        stochastic_rounding: bool = True,
        seed: int = 0,
        on_nonfinite: OnNonfinite = "propagate",
        overlap: bool = False,
        eval_with_ema: bool = False,
        save_ema_model: bool = False,
        on_missing_average: str = "warn",
        name: str | None = None,
    ) -> None:
        if isinstance(decay, Mapping):
            raise ArgumentTypeError(
                "`decay` must be a number or a schedule: for several averages take several"
                " callbacks, each with a name"
            )
        if on_missing_average not in ("warn", "error"):
            raise ArgumentError(
                f"`on_missing_average` must be 'warn' or 'error', got {shown(on_missing_average)}"
            )
        if name is not None and not (isinstance(name, str) and name.isidentifier()):
            raise ArgumentError(f"`name` must be an identifier, got {shown(name)}")
        self.eval_with_ema = validate.boolean("eval_with_ema", eval_with_ema)
        self.save_ema_model = validate.boolean("save_ema_model", save_ema_model)
        self.name = name
        settings = Settings(
            decay=decay,
            update_after_step=update_after_step,
            update_every=update_every,
            dtype=dtype,
            device=device,
            include=include,
            exclude=exclude,
            buffers=buffers,
            compensated=compensated,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            on_nonfinite=on_nonfinite,
            overlap=overlap,
        )
        self._run = RunAverage(settings)
        self._evaluation = EvaluationSwap()
        self._course = Course(
            self._run, self._evaluation, name, missing_is_error=on_missing_average == "error"
        )
        self._applied = ExitStack()  # from apply_ema to restore_original
        self._processing_class: Any = None  # of the Trainer, or the tokenizer of its data collator

    @property
    def has_average(self) -> bool:
        """Whether training has begun or a state was loaded."""
        return self._run.exists

    @property
    def ema_model(self) -> EMAModel[nn.Module]:
        """The average of the run.

        Raises:
            StateError: training has not begun, and no state was applied to a model.
        """
        return self._run.ema_model

    def apply_ema(self, model: nn.Module | None = None, *, assign: bool = False) -> None:
        """Swap the averaged weights into ``model``, see :meth:`EMAModel.apply_ema`.

        Args:
            model: the model that was trained, or another with the same names and shapes. It may
                only be left out after training.
            assign: let its parameters refer to the memory of the averages.

        Raises:
            StateError: there is no average, or it is swapped into another model.
            ModelError: the average does not fit ``model``.
            CheckpointError: the loaded state does not fit ``model``.
        """
        self._evaluation.end()  # from now on it is for the caller to restore
        average = self._run.fit(model)
        average.apply_ema(model, assign=assign)
        self._applied.close()
        self._applied.enter_context(applied(average, model, self._course.optimizers, assign=assign))

    def restore_original(self, model: nn.Module | None = None) -> None:
        """Put the live weights back into the model that :meth:`apply_ema` was called with.

        Raises:
            StateError: no averages are swapped in, or not into ``model``.
        """
        self.ema_model.restore_original(model)
        self._applied.close()

    @contextmanager
    def use_ema(
        self, model: nn.Module | None = None, *, assign: bool = False
    ) -> Iterator[nn.Module]:
        """Averaged weights inside the block, see :meth:`EMAModel.use_ema`."""
        loan = Loan(self._run.fit(model), model, self._course.optimizers, assign=assign)
        with self._evaluation.suspended(), loan.block() as averaged:
            yield averaged

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Averaged weights inside the block, and live ones in the checkpoints written there."""
        loan = Loan(self._run.fit(model), model, self._course.optimizers)
        with self._evaluation.suspended(), loan.block(), known_to_evaluate(loan):
            yield

    def get_ema_state(self) -> dict[str, Any]:
        """The state to save, see :meth:`EMAModel.state_dict`.

        Raises:
            StateError: there is none yet.
        """
        return self._run.state()

    def load_ema_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`get_ema_state`, or apply it to a model.

        The next ``train()`` starts with it, whatever that resumes from. Without a model yet the
        state is kept for the one that is trained or given to :meth:`apply_ema` next; what can be
        checked is checked now.

        Raises:
            CheckpointError: the state is damaged or does not fit the model. Nothing has changed.
            StateError: averages are swapped in.
        """
        self._evaluation.end()
        self._run.load(state)

    def save_pretrained(
        self,
        model: nn.Module,
        folder: str | Path,
        *,
        processing_class: Any = None,
        **options: Any,
    ) -> None:
        """Write a complete model with averaged weights that ``from_pretrained(folder)`` loads.

        Args:
            model: the model that was trained; of a PEFT model the adapter is written.
            folder: is created where needed; ``ema.json`` in it says what the weights are.
            processing_class: a tokenizer or processor that is written beside the model. By default
                that of the Trainer whose run began last, or the tokenizer of its data collator: what
                the Trainer puts into its checkpoints.
            **options: for the model's own ``save_pretrained``.

        Raises:
            ArgumentTypeError: the model or ``processing_class`` has no ``save_pretrained``.
            ModelError: the average does not fit ``model``.
            StateError: there is no average.
        """
        with self._evaluation.suspended():
            save_pretrained(
                self._run.fit(model),
                model,
                folder,
                processing_class=(
                    self._processing_class if processing_class is None else processing_class
                ),
                **options,
            )

    def attach(self, trainer: Trainer) -> EMACallback:
        """Serve this Trainer beyond what events allow; adds itself to its callbacks if need be.

        Until :meth:`detach`, for any subclass of ``Trainer``:

        - resuming finds the average in whatever folder ``train(resume_from_checkpoint=…)`` names,
          and takes no further step where that is a checkpoint of the last one;
        - with ``eval_with_ema``, ``evaluate()`` and ``predict()`` see the averaged weights also
          outside of training, and the live ones are back whatever they raise;
        - the logs of training hold ``ema_decay``, ``ema_updates`` and ``ema_distance``, the
          relative distance ``‖average − params‖ / ‖params‖``.

        Returns:
            The callback itself.

        Raises:
            StateError: it is attached already.
        """
        if self._course.attachment is not None:
            raise StateError("the callback is attached to a Trainer already: detach it first")
        self._evaluation.end()
        self._course.attachment = Attachment(self, trainer, self._course.checkpoints)
        return self

    def detach(self) -> None:
        """Undo :meth:`attach`.

        Raises:
            StateError: it is not attached, or another callback was attached after it.
        """
        if self._course.attachment is None:
            raise StateError("the callback is attached to no Trainer")
        self._course.attachment.undo()
        self._course.attachment = None

    def log_values(self) -> dict[str, float]:
        """Decay of the last update, updates so far and relative distance to the live weights.

        While averages are swapped in, the distance is left out.
        """
        return self._run.log_values("ema" if self.name is None else f"ema_{self.name}")

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Start the average, or go on with the one that was saved or loaded."""
        if model is None:
            return
        claim(state, file_name(self.name), evaluates=self.eval_with_ema)
        self._processing_class = processing_class_of(**kwargs)
        self._course.begin(args, state, model, optimizer)
        if args.eval_on_start:
            self._begin_evaluation()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Train with the live weights."""
        self._course.begin_step(args, state, control)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the scale of the gradients, if there is one."""
        self._course.before_step(args, state, control, optimizer)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Update after an optimizer step, unless the gradient scaler skipped it."""
        self._course.follow(args, state, control, optimizer)
        self._begin_evaluation()  # a callback that comes later may ask for one

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare for an evaluation or a save at the end of the epoch."""
        self._course.end_epoch(args, state, control)
        self._begin_evaluation()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the averages to the callbacks that come later too, then the live weights."""
        self._evaluation.end_after_event()
        if self.eval_with_ema and self._run.exists:
            advice.on_live_evaluation(self.ema_model)

    on_predict = on_evaluate  # type: ignore[assignment]  # its metrics are among `kwargs`

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the average into the checkpoint, as its last file."""
        self._course.save(args, state)

    def _told(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look whether a checkpoint was saved without an event."""
        self._course.complete(args, state, control)

    on_epoch_begin = on_substep_end = on_optimizer_step = on_log = _told

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the best average where the best model is kept, and write the averaged model."""
        self._course.end(args, state, control, best_is_averaged=self.eval_with_ema)
        writes = args.should_save or self.ema_model.sharded
        if self.save_ema_model and writes and model is not None:
            self.save_pretrained(model, model_folder(args, state, self.name))

    def _begin_evaluation(self) -> None:
        """Prepare for an evaluation, if it is to see the averages."""
        if self.eval_with_ema:
            self._course.arm_evaluation()
