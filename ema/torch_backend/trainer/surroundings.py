"""Find out from the call stack where in a Trainer a call comes from.

The Trainer does not tell a callback whether its own evaluation or another callback is using the
model. The calls in progress show which of the two it is.
"""

from __future__ import annotations

import dataclasses
import inspect
from types import FrameType

from transformers.trainer_callback import CallbackHandler

__all__ = ["Surroundings", "surroundings"]

_EVALUATIONS = frozenset(
    ("evaluate", "predict", "_evaluate", "evaluation_loop", "prediction_loop", "prediction_step")
)
_CALLS = _EVALUATIONS | {"train", "_save_checkpoint"}


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """The calls of a Trainer that are in progress.

    Attributes:
        training: whether ``train()`` is in progress. The other attributes count only calls inside
            the innermost ``train()``.
        evaluating: whether an evaluation or a prediction is in progress.
        saving: whether a checkpoint is being written.
        events: how many events are being sent to callbacks, one inside the other.
        handler: the handler that sends the innermost event, or None.
    """

    training: bool
    evaluating: bool
    saving: bool
    events: int
    handler: CallbackHandler | None

    @property
    def evaluation_of_training(self) -> bool:
        """Whether training is in one of its evaluations or predictions."""
        return self.training and self.evaluating

    @property
    def another_callback(self) -> bool:
        """Whether a callback makes this call, outside of any evaluation."""
        return self.events > 0 and not self.evaluating


def surroundings() -> Surroundings:
    """Inspect the calls in progress in this thread, from the innermost one to ``train()``."""
    handlers: list[CallbackHandler] = []
    training = evaluating = saving = False
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and not training:
        call = frame.f_code.co_name
        if call == "call_event" and isinstance(owner := _owner(frame), CallbackHandler):
            handlers.append(owner)
        elif call in _CALLS and _is_trainer(_owner(frame)):
            training = call == "train"
            saving = saving or call == "_save_checkpoint"
            evaluating = evaluating or call in _EVALUATIONS
        frame = frame.f_back
    innermost = handlers[0] if handlers else None
    return Surroundings(training, evaluating, saving, len(handlers), innermost)


def _owner(frame: FrameType) -> object:
    return frame.f_locals.get("self")


def _is_trainer(owner: object) -> bool:
    """Whether it sends events as a ``Trainer`` does; it need not be one."""
    return isinstance(getattr(owner, "callback_handler", None), CallbackHandler)
