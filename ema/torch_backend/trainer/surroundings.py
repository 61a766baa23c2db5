"""Where in a Trainer a call comes from, read from the stack of calls.

The Trainer gives a callback no way to tell the evaluation of a step from whatever another callback
does with the model meanwhile. The calls in progress tell them apart.
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
        training: whether ``train()`` is; what follows is about the innermost one.
        evaluating: whether an evaluation or a prediction is.
        saving: whether a checkpoint is being written.
        events: how many events are being told to callbacks, one inside the other.
        handler: tells the innermost of them.
    """

    training: bool
    evaluating: bool
    saving: bool
    events: int
    handler: CallbackHandler | None

    @property
    def evaluation_of_training(self) -> bool:
        """Whether training is in one of its evaluations."""
        return self.training and self.evaluating

    @property
    def another_callback(self) -> bool:
        """Whether a callback does this that was not called from within an evaluation."""
        return self.events > 0 and not self.evaluating


def surroundings() -> Surroundings:
    """Look at the calls in progress in this thread, from the innermost one to ``train()``."""
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
    """Also a class that sends the same events without being a ``Trainer``."""
    return isinstance(getattr(owner, "callback_handler", None), CallbackHandler)
