"""Optimizers that rewrite the weights in ``eval()`` and ``train()``, as schedule-free ones do.

The Trainer calls these methods in the middle of an evaluation, when averages may be in the model.
The live weights come back for the time of the call: such an optimizer rewrites these, exactly as
often as it does without an average. Outside of training the Trainer never goes back to ``train()``
after an evaluation. There the call does not reach the optimizer, and its mode and weights stay as they are.
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
    """The optimizer inside its wrappers, if it has the two methods."""
    while isinstance(optimizer, AcceleratedOptimizer):  # which always has them
        optimizer = optimizer.optimizer
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if all(callable(getattr(candidate, mode, None)) for mode in ("eval", "train")):
            return candidate
    return None


class RunOptimizer:
    """The optimizer of the run that began last, if it has modes; not kept alive."""

    def __init__(self) -> None:
        self._optimizer: weakref.ref[Any] | None = None

    def set(self, optimizer: Any) -> None:
        """Remember it."""
        inner = with_modes(optimizer)
        self._optimizer = None if inner is None else weakref.ref(inner)

    def get(self) -> Any | None:
        """It, or None."""
        return None if self._optimizer is None else self._optimizer()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles belong to no run."""
        return {"_optimizer": None}


@contextmanager
def rewriting_live_weights(
    optimizers: Iterable[Any], live_weights: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Inside the block, ``eval()`` and ``train()`` of these optimizers rewrite live weights.

    An evaluation outside of training does not reach them.

    Args:
        optimizers: wrapped or not; what has no modes, None included, is left alone.
        live_weights: puts them into the model for the time of a call.
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
        average: is lent.
        model: gets it, by default the live one.
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
        """Whether it is to this model, wrapped or not."""
        return unwrap(self._model) is unwrap(model)

    @contextmanager
    def block(self) -> Iterator[nn.Module]:
        """Averaged weights inside the block."""
        with self._inside, rewriting_live_weights(self._optimizers, self.suspended):
            self._begin()
            yield self._model

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Live weights inside this block, which lies within the other one."""
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
    """Optimizers may change their mode while ``average.apply_ema(model)`` holds."""

    @contextmanager
    def live_weights() -> Iterator[None]:
        try:
            average.restore_original()
        except StateError:  # they were put back by other means
            yield
            return
        try:
            yield
        finally:
            average.apply_ema(model, assign=assign)

    with rewriting_live_weights(optimizers, live_weights):
        yield
