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
    checkpoint or you have loaded a state. Each checkpoint of the run holds the average in
    ``ema.safetensors``, which is written last. A resumed run finds this file.

    ``callbacks=[ema_callback]`` does everything that events allow. :meth:`attach` does the rest. It
    resumes from any folder, shows the averages to ``trainer.evaluate()`` and ``predict()`` outside
    of training, restores the live weights at once if an evaluation raises, and adds to the
    Trainer's logs.

    ``apply_ema``, ``restore_original``, ``get_ema_state`` and ``load_ema_state`` also work without
    a ``Trainer``, for instance in a new process.

    Args:
        decay: the decay of one update in [0, 1], or a schedule.
        update_after_step: up to and including this step the average equals the live weights.
        update_every: number of optimizer steps from one update to the next.
        dtype: of all averages; :class:`EMAModel` describes the options from here to ``overlap``.
        device: device of the averages.
        include: patterns of the parameters that are averaged.
        exclude: patterns of the parameters that are not averaged.
        buffers: ``"copy"``, ``"average"`` or a mapping from patterns to these.
        compensated: keep the rounding error of each update.
        stochastic_rounding: round bfloat16 averages up or down at random.
        seed: seed of the stochastic rounding.
        on_nonfinite: ``"propagate"``, ``"skip"`` or ``"raise"``, if live weights hold NaN or Inf.
        overlap: on a GPU, whether updates run beside the training step.
        eval_with_ema: whether evaluations see the averaged weights. Training continues with the
            live weights, and checkpoints hold the live weights. With ``load_best_model_at_end`` the
            average at the end is the average that gave the best metric.
        save_ema_model: whether to write a complete averaged model to ``<output_dir>/ema`` (with a
            ``name``, to ``ema-<name>``) at the end of training, see :meth:`save_pretrained`.
        on_missing_average: ``"warn"`` or ``"error"``, if a checkpoint has no average.
        name: tells several callbacks of a Trainer apart; the file is ``ema-<name>.safetensors``.

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
                "`decay` must be a number or a schedule: for several averages use several"
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
        self._applied = ExitStack()  # what to undo in restore_original
        self._processing_class: Any = None  # see `processing_class_of`

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
            model: the model that was trained, or another with the same names and shapes. You can
                leave it out only after training.
            assign: let the model's parameters refer to the memory of the averages.

        Raises:
            StateError: there is no average, or it is swapped into another model.
            ModelError: the average does not fit ``model``.
            CheckpointError: the loaded state does not fit ``model``.
        """
        self._evaluation.end()  # from now on the caller restores the live weights
        average = self._run.fit(model)
        average.apply_ema(model, assign=assign)
        self._applied.close()
        self._applied.enter_context(applied(average, model, self._course.optimizers, assign=assign))

    def restore_original(self, model: nn.Module | None = None) -> None:
        """Put the live weights back into the model that :meth:`apply_ema` was called with.

        Raises:
            StateError: no averages are swapped in, or they are in another model.
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
        """Averaged weights inside the block; checkpoints written there hold the live weights."""
        loan = Loan(self._run.fit(model), model, self._course.optimizers)
        with self._evaluation.suspended(), loan.block(), known_to_evaluate(loan):
            yield

    def get_ema_state(self) -> dict[str, Any]:
        """The state to save, see :meth:`EMAModel.state_dict`.

        Raises:
            StateError: training has not begun, and no state was loaded.
        """
        return self._run.state()

    def load_ema_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of :meth:`get_ema_state`, or prepare to apply it to a model.

        The next ``train()`` starts with this state, even if it resumes from a checkpoint. Before
        the callback knows a model, it keeps the state for the next model that is trained or passed
        to :meth:`apply_ema`. It finds damage now, and checks later that the state fits the model.

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
            model: the model that was trained; for a PEFT model, only the adapter is written.
            folder: where to write; it is created if needed. ``ema.json`` describes the average.
            processing_class: a tokenizer or processor to write beside the model; by default the
                processing class of the latest Trainer, or the tokenizer of its data collator.
            **options: options of the model's own ``save_pretrained``.

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
        """Wrap methods of this Trainer to do what events do not allow; add the callback if missing.

        Until :meth:`detach`, for any subclass of ``Trainer``:

        - resuming finds the average in any folder that ``train(resume_from_checkpoint=…)`` names,
          and takes no further step if the checkpoint is that of the last step;
        - with ``eval_with_ema``, ``evaluate()`` and ``predict()`` see the averaged weights outside
          of training too, and the live weights come back even if an evaluation raises;
        - the logs of training hold ``ema_decay``, ``ema_updates`` and ``ema_distance``, the
          relative distance ``‖average − params‖ / ‖params‖``.

        Returns:
            The callback itself.

        Raises:
            StateError: the callback is attached already.
        """
        if self._course.attachment is not None:
            raise StateError("the callback is attached to a Trainer already: detach it first")
        self._evaluation.end()
        self._course.attachment = Attachment(self, trainer, self._course.checkpoints)
        return self

    def detach(self) -> None:
        """Undo :meth:`attach`.

        Raises:
            StateError: the callback is not attached, or another one was attached after it.
        """
        if self._course.attachment is None:
            raise StateError("the callback is not attached to a Trainer: attach it first")
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
        """Start the average, or continue the one that was saved or loaded."""
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
        """Make sure that training uses the live weights."""
        self._course.begin_step(args, state, control)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Remember the scale of the gradients before the step, if there is one."""
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
        self._begin_evaluation()  # a later callback may ask for an evaluation

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare for an evaluation or a save at the end of the epoch."""
        self._course.end_epoch(args, state, control)
        self._begin_evaluation()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let later callbacks see the averages too, then put the live weights back."""
        self._evaluation.end_after_event()
        if self.eval_with_ema and self._run.exists:
            advice.on_live_evaluation(self.ema_model)

    def on_predict(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Do the same after a prediction."""
        self.on_evaluate(args, state, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the average into the checkpoint, as its last file."""
        self._course.save(args, state)

    def _told(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check whether a checkpoint was saved without an event, and write its average."""
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
        """Prepare for an evaluation, if evaluations see the averages."""
        if self.eval_with_ema:
            self._course.arm_evaluation()
