"""Optimizers that rewrite the weights in ``eval()`` and ``train()``, as schedule-free ones do.

The Trainer calls these methods in the middle of an evaluation, when averages may be in the model.
The live weights come back during the call, so the optimizer rewrites the live weights exactly as
often as it does without an average. Outside of training the Trainer never calls ``train()`` after
an evaluation. There ``eval()`` does not reach the optimizer, so its mode and the weights do not
change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from ema.errors import StateError
from ema.torch_backend.model import EMAModel
from ema.torch_backend.tensors.names import unwrap
from ema.torch_backend.trainer.overrides import overridden
from ema.torch_backend.trainer.surroundings import surroundings

__all__ = ["Loan", "RunOptimizer", "applied", "rewriting_live_weights", "with_modes"]


def with_modes(optimizer: Any) -> Any | None:
    """The optimizer inside its wrappers if it has ``eval`` and ``train`` methods, else None."""
    while isinstance(optimizer, AcceleratedOptimizer):  # the wrapper always has both methods
        optimizer = optimizer.optimizer
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if all(callable(getattr(candidate, mode, None)) for mode in ("eval", "train")):
            return candidate
    return None


class RunOptimizer:
    """A weak reference to the optimizer of the latest run, if that optimizer has modes."""

    def __init__(self) -> None:
        self._optimizer: weakref.ref[Any] | None = None

    def set(self, optimizer: Any) -> None:
        """Remember the optimizer, if it has modes."""
        inner = with_modes(optimizer)
        self._optimizer = None if inner is None else weakref.ref(inner)

    def get(self) -> Any | None:
        """The optimizer, or None."""
        return None if self._optimizer is None else self._optimizer()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the optimizer out of copies and pickles, which belong to no run."""
        return {"_optimizer": None}


@contextmanager
def rewriting_live_weights(
    optimizers: Iterable[Any], live_weights: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Inside the block, ``eval()`` and ``train()`` of these optimizers rewrite live weights.

    Outside of training, the calls of an evaluation do not reach the optimizers.

    Args:
        optimizers: wrapped or not. None and optimizers without modes are ignored.
        live_weights: makes a context in which the model holds the live weights.
    """

    def change_mode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        place = surroundings()
        if place.evaluating and not place.training:
            return None
        with live_weights():
            return original(*args, **kwargs)

    inner = {id(found): found for optimizer in optimizers if (found := with_modes(optimizer))}
    with ExitStack() as replaced:
        for optimizer in inner.values():
            replaced.enter_context(overridden(optimizer, eval=change_mode, train=change_mode))
        yield


class Loan:
    """``average.use_ema(model)`` in which optimizers may change their mode.

    Args:
        average: the average to lend.
        model: the model that receives it; by default the live model.
        optimizers: wrapped or not.
        assign: see :meth:`EMAModel.use_ema`.
    """

    def __init__(
        self,
        average: EMAModel[nn.Module],
        model: nn.Module | None,
        optimizers: Iterable[Any],
        *,
        assign: bool = False,
    ) -> None:
        self._average = average
        self._model = average.model if model is None else model
        self._optimizers = list(optimizers)
        self._assign = assign
        self._inside = ExitStack()

    def is_of(self, model: nn.Module) -> bool:
        """Whether the average is lent to this model, wrapped or not."""
        return unwrap(self._model) is unwrap(model)

    @contextmanager
    def block(self) -> Iterator[nn.Module]:
        """Averaged weights inside the block."""
        with self._inside, rewriting_live_weights(self._optimizers, self.suspended):
            self._begin()
            yield self._model

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Live weights inside this block, which must lie within :meth:`block`."""
        self._inside.close()
        try:
            yield
        finally:
            self._begin()

    def _begin(self) -> None:
        self._inside.enter_context(self._average.use_ema(self._model, assign=self._assign))


@contextmanager
def applied(
    average: EMAModel[nn.Module],
    model: nn.Module | None,
    optimizers: Iterable[Any],
    *,
    assign: bool = False,
) -> Iterator[None]:
    """Let optimizers change their mode while ``average.apply_ema(model)`` is in effect."""

    @contextmanager
    def live_weights() -> Iterator[None]:
        try:
            average.restore_original()
        except StateError:  # other code has put the live weights back
            yield
            return
        try:
            yield
        finally:
            average.apply_ema(model, assign=assign)

    with rewriting_live_weights(optimizers, live_weights):
        yield
