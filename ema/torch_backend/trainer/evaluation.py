"""Averaged weights for the evaluations of a Trainer that only sends events.

The Trainer announces an evaluation at the end of a step, when later callbacks in the list have yet
to see the live weights of that step. So the callback only *arms* the model: it replaces the model's
``train`` method. The evaluation calls ``model.eval()``, which calls ``train(False)``, after the
last callback has handled the step and before the first forward pass. Wrappers of the model pass the
call on. At that moment the averages are swapped in. They are swapped out when the last callback has
received the metrics.

An evaluation that raises sends no event. The averages are then swapped out at the next event, or
when code outside of an evaluation reads the model's weights, loads others or changes its mode.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ema.errors import warn
from ema.torch_backend.model import EMAModel
from ema.torch_backend.tensors.names import unwrap
from ema.torch_backend.trainer.optimizer_modes import Loan, RunOptimizer, rewriting_live_weights
from ema.torch_backend.trainer.overrides import overridden
from ema.torch_backend.trainer.surroundings import surroundings

__all__ = ["EvaluationSwap", "known_to_evaluate", "live_weights"]

_begun: weakref.WeakSet[EvaluationSwap | Loan] = weakref.WeakSet()
"""The swaps that hold averages in a model for an evaluation."""


class EvaluationSwap:
    """Keeps averages in the model from an evaluation's ``model.eval()`` to its last callback."""

    def __init__(self) -> None:
        self._average: EMAModel[nn.Module] | None = None  # while the model is armed
        self._optimizer = RunOptimizer()
        self._armed = ExitStack()
        self._inside = ExitStack()
        self._last = _LastCallback(self)

    @property
    def inside(self) -> bool:
        """Whether the averages are in the model."""
        return self in _begun

    def arm(self, average: EMAModel[nn.Module], optimizer: RunOptimizer) -> None:
        """Swap the averages in for each evaluation that begins before :meth:`end`.

        Args:
            average: the average of the model that is trained.
            optimizer: the optimizer that trains the model.
        """
        self.end()
        # any wrapper of the model passes the call on to the inner model
        self._armed.enter_context(overridden(unwrap(average.model), train=self._mode_changes))
        self._average, self._optimizer = average, optimizer

    def end(self) -> None:
        """Put the live weights back if need be, and remove the replaced methods from the model."""
        self._leave()
        self._average = None
        self._last.step_back()
        self._armed.close()

    def end_after_event(self) -> None:
        """Put the live weights back when the last callback has handled this evaluation.

        A callback may run an evaluation while it handles the event of another evaluation. Then the
        averages stay until the outer evaluation ends.
        """
        place = surroundings()
        if self.inside and place.handler is not None and place.events == 1:
            self._last.follow(place.handler)

    def last_was_told(self) -> None:
        """Put the live weights back, because every callback has received the metrics."""
        if surroundings().events == 1:
            self._last.step_back()
            self._leave()

    def is_of(self, model: nn.Module) -> bool:
        """Whether this swap holds averages in ``model``."""
        average = self._average
        return self.inside and average is not None and unwrap(average.model) is unwrap(model)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Live weights inside the block; after it the weights from before."""
        inside = self.inside
        self._leave()
        try:
            yield
        finally:
            if inside and not self.inside:
                self._enter()

    def _enter(self) -> None:
        if (average := self._average) is None:
            return
        with ExitStack() as inside:
            inside.enter_context(average.use_ema())
            watched = {"state_dict": self._is_read, "load_state_dict": self._is_loaded}
            for module in average.model.modules():
                inside.enter_context(overridden(module, **watched))
            # parameters() calls it too; a forward pass may call it on a part, so only the whole
            # model is watched
            inside.enter_context(overridden(average.model, named_parameters=self._is_read))
            inside.enter_context(rewriting_live_weights([self._optimizer.get()], self.suspended))
            self._inside = inside.pop_all()
            _begun.add(self)

    def _leave(self) -> None:
        _begun.discard(self)
        self._inside.close()

    def _mode_changes(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``model.train(mode)``: an evaluation begins or ends."""
        place = surroundings()
        trains = bool(args[0] if args else kwargs.get("mode", True))
        if not place.training or (trains and not place.evaluating and place.events == 0):
            self.end()
        elif place.another_callback:
            self._leave()
        elif not trains and place.events == 0 and not self.inside:
            self._enter()
        return original(*args, **kwargs)

    def _is_read(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        place = surroundings()
        if not place.evaluation_of_training:
            self._is_over()
        elif place.saving:
            warn(
                "a checkpoint that a callback writes during an evaluation holds the live weights,"
                " and the model keeps them from now on: later callbacks do not see the averages"
                " that were evaluated; attach(trainer) shows them the averages"
            )
            self._is_over()
        return original(*args, **kwargs)

    def _is_loaded(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._is_over()
        return original(*args, **kwargs)

    def _is_over(self) -> None:
        """Put the live weights back; keep the model armed, as training may evaluate again."""
        if surroundings().training:
            self._leave()
        else:
            self.end()


class _LastCallback(TrainerCallback):
    """Handles the events of an evaluation after all other callbacks."""

    def __init__(self, swap: EvaluationSwap) -> None:
        self._swap = swap
        self._callbacks: list[TrainerCallback] = []

    def follow(self, handler: CallbackHandler) -> None:
        """Take the last place in the list of callbacks that is being called."""
        self.step_back()
        self._callbacks = handler.callbacks
        self._callbacks.append(self)

    def step_back(self) -> None:
        """Leave the list of callbacks, if it is in one."""
        if self in self._callbacks:
            self._callbacks.remove(self)
        self._callbacks = []

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        self._swap.last_was_told()

    def on_predict(self, *_: Any, **__: Any) -> None:
        self._swap.last_was_told()


@contextmanager
def known_to_evaluate(loan: Loan) -> Iterator[None]:
    """Let :func:`live_weights` know that a loan serves an evaluation."""
    _begun.add(loan)
    try:
        yield
    finally:
        _begun.discard(loan)


@contextmanager
def live_weights(model: nn.Module) -> Iterator[None]:
    """Live weights inside the block, even if another callback has begun to evaluate averages."""
    with ExitStack() as suspended:
        for swap in [swap for swap in _begun if swap.is_of(model)]:
            suspended.enter_context(swap.suspended())
        yield
