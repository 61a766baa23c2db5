"""Averaged weights for the evaluations of a Trainer that only sends events.

A callback is told that an evaluation will come, but not when the last of its data sets is done, and
weights are saved without any event in between. So the averages leave the model at whatever comes
first: the next event of training, a training-mode forward pass, or anything that reads or writes
the weights through a state dict.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ema.torch_backend.model import EMAModel

__all__ = ["EvaluationSwap"]


class EvaluationSwap:
    """The averages in the model from :meth:`begin` to the first sign that evaluation is over."""

    def __init__(self) -> None:
        self._average: EMAModel[nn.Module] | None = None
        self._hooks: list[RemovableHandle] = []

    def begin(self, average: EMAModel[nn.Module]) -> None:
        """Swap the averages in, and watch for the end."""
        self.end()
        average.apply_ema()
        self._average = average
        model = average.model

        def over(*_: Any, **__: Any) -> None:
            self.end()

        def over_if_training(module: nn.Module, *_: Any) -> None:
            if module.training:
                self.end()

        self._hooks = [
            model.register_state_dict_pre_hook(over),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_pre_hook(over),  # type: ignore[no-untyped-call]
            model.register_forward_pre_hook(over_if_training),
        ]

    def end(self) -> None:
        """Put the live weights back, if they are not there."""
        average, self._average = self._average, None
        if average is not None:
            average.restore_original()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
