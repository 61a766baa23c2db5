"""Averaged weights for the evaluations of a Trainer that only sends events.

A callback is told that an evaluation will come, but not when the last of its data sets is done, and
weights are saved without any event in between. So the averages leave the model at whatever comes
first: the next event of training, a training-mode forward pass, or anything that reads or writes
the weights through a state dict, of the model or of a part of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ema.torch_backend.model import EMAModel

__all__ = ["EvaluationSwap", "live_weights"]

_begun: weakref.WeakSet[EvaluationSwap] = weakref.WeakSet()
"""Those that have averages in a model."""


class EvaluationSwap:
    """The averages in the model from :meth:`begin` to the first sign that evaluation is over."""

    def __init__(self) -> None:
        self._average: EMAModel[nn.Module] | None = None
        self._inside = ExitStack()

    def begin(self, average: EMAModel[nn.Module]) -> None:
        """Swap the averages in, and watch for the end."""
        self.end()

        def over(*_: Any, **__: Any) -> None:
            self.end()

        def over_if_training(module: nn.Module, *_: Any) -> None:
            if module.training:
                self.end()

        with ExitStack() as inside:
            inside.enter_context(average.use_ema())
            model = average.model
            # before those of FSDP, which gather the weights as they are
            hook = model.register_forward_pre_hook(over_if_training, prepend=True)
            inside.callback(hook.remove)
            for module in model.modules():
                for register in (
                    module.register_state_dict_pre_hook,
                    module.register_load_state_dict_pre_hook,
                ):
                    inside.callback(register(over).remove)  # type: ignore[no-untyped-call]
            self._inside, self._average = inside.pop_all(), average
            _begun.add(self)

    def end(self) -> None:
        """Put the live weights back, if they are not there."""
        self._average = None
        _begun.discard(self)
        self._inside.close()

    def is_of(self, model: nn.Module) -> bool:
        """Whether it has averages in ``model``."""
        return self._average is not None and self._average.model is model

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Live weights, and nobody watching, inside the block; then as it was before."""
        average = self._average
        self.end()
        try:
            yield
        finally:
            if average is not None:
                self.begin(average)


@contextmanager
def live_weights(model: nn.Module) -> Iterator[None]:
    """Live weights inside the block, for a callback that comes after one that has begun to evaluate."""
    with ExitStack() as suspended:
        for swap in [swap for swap in _begun if swap.is_of(model)]:
            suspended.enter_context(swap.suspended())
        yield
