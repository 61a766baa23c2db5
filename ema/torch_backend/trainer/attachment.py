"""Wrappers around the methods of one Trainer, which do what the events do not allow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ema.errors import StateError
from ema.torch_backend.trainer.checkpoints import Checkpoints
from ema.torch_backend.trainer.evaluation import live_weights

if TYPE_CHECKING:
    from ema.torch_backend.trainer.callback import EMACallback

__all__ = ["Attachment"]


class Attachment:
    """Wraps methods of one Trainer until :meth:`undo`.

    The wrappers are attributes of the instance and pass all arguments on. So any subclass keeps its
    own methods, and the calls within the Trainer go through the wrappers too.

    Attributes:
        trains: whether this Trainer is training; the callback may serve another Trainer as well.
        resumed_from: the checkpoint that ``train()`` was told to resume from, or None.
    """

    def __init__(self, callback: EMACallback, trainer: Trainer, checkpoints: Checkpoints) -> None:
        self.trains = False
        self.resumed_from: Path | None = None
        self._trainer = trainer
        self._callback = callback
        self._checkpoints = checkpoints
        self._added = callback not in trainer.callback_handler.callbacks
        if self._added:
            trainer.add_callback(callback)
        self._wrapped: dict[str, Callable[..., Any]] = {}
        self._before: dict[str, Any] = {}
        self._wrap("train", self._train)
        self._wrap("log", self._log)
        self._wrap("get_batch_samples", self._batches)
        self._wrap("_save_checkpoint", self._save)
        self._wrap("_tune_save_checkpoint", self._save_for_tune)
        if callback.eval_with_ema:
            self._wrap("evaluate", self._with_average)
            self._wrap("predict", self._with_average)

    @property
    def optimizer(self) -> Any:
        """The optimizer of the Trainer, once it has one."""
        return self._trainer.optimizer

    def undo(self) -> None:
        """Give the Trainer its own methods back.

        Raises:
            StateError: other code has wrapped the methods since; nothing has changed.
        """
        own = vars(self._trainer)
        if covered := [name for name, ours in self._wrapped.items() if own.get(name) is not ours]:
            raise StateError(
                f"`detach` must come after that of other callbacks: one of them wraps {covered} too"
            )
        for name in self._wrapped:
            if name in self._before:
                own[name] = self._before[name]
            else:
                del own[name]
        if self._added:
            self._trainer.remove_callback(self._callback)

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        own = vars(self._trainer)
        if name in own:
            self._before[name] = own[name]
        original = getattr(self._trainer, name)
        own[name] = self._wrapped[name] = functools.wraps(original)(
            functools.partial(around, original)
        )

    def _train(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Remember the checkpoint, because the Trainer does not name it to callbacks."""
        path = args[0] if args else kwargs.get("resume_from_checkpoint")
        if path is True:
            path = get_last_checkpoint(self._trainer.args.output_dir)  # type: ignore[no-untyped-call]
        self.resumed_from = Path(path) if path else None
        self.trains = True
        self._checkpoints.forget()
        try:
            return original(*args, **kwargs)
        finally:
            self.trains, self.resumed_from = False, None

    def _log(
        self, original: Callable[..., Any], logs: dict[str, float], *args: Any, **kwargs: Any
    ) -> Any:
        """Add the numbers of the average to the logs of training."""
        if self.trains and "loss" in logs:
            logs = {**logs, **self._callback.log_values()}
        return original(logs, *args, **kwargs)

    def _batches(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return no more batches when all steps are done.

        The Trainer checks ``max_steps`` only after a step. A run that resumes from the checkpoint
        of its last step would take one more step, unless the last step ended an epoch.
        """
        trainer = self._trainer
        if self.trains and trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return [], None
        return original(*args, **kwargs)

    def _save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Save a checkpoint with its average, at any moment and for any caller."""
        trial = args[1] if len(args) > 1 else kwargs.get("trial")
        folder = self._trainer._get_output_dir(trial)
        return self._with_file(folder, functools.partial(original, *args, **kwargs))

    def _save_for_tune(self, original: Callable[..., Any], checkpoint_dir: str) -> Any:
        """Save a checkpoint with its average for Ray Tune, which uses a folder of its own."""
        return self._with_file(checkpoint_dir, functools.partial(original, checkpoint_dir))

    def _with_file(self, parent: str, save: Callable[[], Any]) -> Any:
        trainer = self._trainer
        model: Any = trainer.model
        if not (self.trains or self._checkpoints.follows(model)):
            return save()
        step = trainer.state.global_step
        folder = Path(parent) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self._checkpoints.saving(trainer.args, folder, step, trainer.optimizer)
        with live_weights(model):
            result = save()
        self._checkpoints.saved(trainer.args, folder, step)
        return result

    def _with_average(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._callback.has_average:  # before training there are only live weights
            return original(*args, **kwargs)
        model: Any = self._trainer.model
        with self._callback.evaluating(model):
            return original(*args, **kwargs)
