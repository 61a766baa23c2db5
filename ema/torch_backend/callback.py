"""``EMACallback``: the average of a Hugging Face ``Trainer`` run."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ema.errors import EMAWarning, StateError
from ema.extras import require
from ema.info import describe_ema
from ema.schedules import Schedule
from ema.torch_backend.model import EMAModel
from ema.torch_backend.settings import Settings
from ema.torch_backend.state import State

require("transformers", "transformers")

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["EMACallback"]

_TOO_MUCH_LEFT = 0.2  # of the initial weights at the end of a run: the average lags far behind


class EMACallback(TrainerCallback):
    """Averages the weights of a ``Trainer`` run after every real optimizer step.

    Steps within a gradient accumulation and steps that the gradient scaler skipped do not count.
    The average starts as a copy of the weights when training begins; a second ``train()`` with the
    same model goes on with it.

    All four methods work without a ``Trainer`` too: a new process loads a state and applies it.

    Args:
        decay: the decay of one update in [0, 1], or a schedule.
        update_after_step: through this step the average equals the live weights.
        update_every: optimizer steps from one update to the next.
        dtype: see :class:`EMAModel`, as for those below.
        device: where the averages are kept.
        include: patterns of the parameters that are averaged.
        exclude: patterns of those that are not.
        buffers: ``"copy"``, ``"average"`` or a mapping from patterns to these.

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
    ) -> None:
        self._options: dict[str, Any] = {
            "decay": decay,
            "update_after_step": update_after_step,
            "update_every": update_every,
            "dtype": dtype,
            "device": device,
            "include": include,
            "exclude": exclude,
            "buffers": buffers,
        }
        self._settings = Settings.of(**self._options)
        self._ema_model: EMAModel[nn.Module] | None = None
        self._loaded: Mapping[str, Any] | None = None  # a state that has not seen its model yet
        self._scale: float | None = None  # of the gradient scaler, before the coming step

    @property
    def ema_model(self) -> EMAModel[nn.Module]:
        """The average of the run.

        Raises:
            StateError: training has not begun, and no state was applied to a model.
        """
        if self._ema_model is None:
            raise StateError("there is no average: train, or load a state and apply it to a model")
        return self._ema_model

    def apply_ema(self, model: nn.Module | None = None) -> None:
        """Swap the averaged weights into ``model``, see :meth:`EMAModel.apply_ema`.

        Args:
            model: the model that was trained, or another with the same names and shapes. It may
                only be left out after training.

        Raises:
            StateError: there is no average, or it is swapped into another model.
            ModelError: the average does not fit ``model``.
            CheckpointError: the loaded state does not fit ``model``.
        """
        self._average_for(model).apply_ema(model)

    def restore_original(self, model: nn.Module | None = None) -> None:
        """Put the live weights back into the model that :meth:`apply_ema` was called with.

        Raises:
            StateError: no averages are swapped in, or not into ``model``.
        """
        self.ema_model.restore_original(model)

    @contextmanager
    def use_ema(self, model: nn.Module | None = None) -> Iterator[nn.Module]:
        """Averaged weights inside the block, see :meth:`EMAModel.use_ema`."""
        with self._average_for(model).use_ema(model) as averaged:
            yield averaged

    def get_ema_state(self) -> dict[str, Any]:
        """The state to save, see :meth:`EMAModel.state_dict`.

        Raises:
            StateError: there is none yet.
        """
        if self._ema_model is None and self._loaded is not None:
            return dict(self._loaded)
        return self.ema_model.state_dict()

    def load_ema_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of :meth:`get_ema_state`, or apply it to a model.

        Without a model yet the state is kept for the one that is trained or given to
        :meth:`apply_ema` next; what can be checked is checked now.

        Raises:
            CheckpointError: the state is damaged or does not fit the model. Nothing has changed.
            StateError: averages are swapped in.
        """
        if self._ema_model is not None:
            self._ema_model.load_state_dict(state)
        else:
            State.from_dict(state)
            self._loaded = state

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Start the average, or go on with the one that was loaded or trained before."""
        if model is None:
            return
        fresh = self._loaded is None and (
            self._ema_model is None or self._ema_model.model is not model
        )
        if fresh:
            self._ema_model = EMAModel(model, **self._options)
        self._average_for(model)
        if fresh and state.global_step > 0:
            warnings.warn(
                f"training goes on from step {state.global_step} and the average starts anew:"
                " call load_ema_state before train() to go on with the one that was saved",
                EMAWarning,
                stacklevel=2,
            )
        self._scale = None
        self._warn_if_too_slow(state.max_steps)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Remember the scale of the gradients, if there is one."""
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and self._scale is None:
            self._scale = scaler.get_scale()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Update after an optimizer step, unless the gradient scaler skipped it."""
        if not self._was_skipped(optimizer):
            self.ema_model.update()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Say so where a whole run has made no update."""
        if self.ema_model.step > 0 and self.ema_model.count == 0:
            warnings.warn(
                f"no update was made in {self.ema_model.step} steps with update_after_step="
                f"{self._settings.update_after_step} and update_every="
                f"{self._settings.update_every}: the average is no average",
                EMAWarning,
                stacklevel=2,
            )

    def _was_skipped(self, optimizer: Any) -> bool:
        """Whether the gradient scaler found an overflow.

        Accelerate says so only of optimizers that the scaler does not call then; a fused one, the
        default of the Trainer, is always called and skips by itself. The scale tells in any case:
        it drops.
        """
        scaler = getattr(optimizer, "scaler", None)
        if scaler is None:
            return False
        before, self._scale = self._scale, scaler.get_scale()
        return bool(optimizer.step_was_skipped) or (before is not None and self._scale < before)

    def _average_for(self, model: nn.Module | None) -> EMAModel[nn.Module]:
        """The average, which a loaded state gets with the first model that it fits."""
        if self._loaded is not None and model is not None:
            average = EMAModel(model, **self._options)
            average.load_state_dict(self._loaded)
            self._ema_model, self._loaded = average, None
        return self.ema_model

    def _warn_if_too_slow(self, max_steps: int) -> None:
        steps = max_steps - self._settings.update_after_step
        if steps < 1:
            return
        about = describe_ema(
            self._settings.schedule, steps, update_every=self._settings.update_every
        )
        if about.initial_share > _TOO_MUCH_LEFT:
            warnings.warn(
                f"after {max_steps} steps {about.initial_share:.0%} of the average will still be"
                f" the initial weights: {self._settings.schedule} is slow for so short a run,"
                f" decay={about.recommended_decay:.4g} suits it",
                EMAWarning,
                stacklevel=2,
            )
