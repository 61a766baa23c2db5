"""The average of each run in turn: a fresh one, or one continued from a loaded state."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from ema.errors import StateError
from ema.torch_backend.calls import uninterrupted
from ema.torch_backend.model import EMAModel, with_settings
from ema.torch_backend.saving.state import State
from ema.torch_backend.settings import Settings

__all__ = ["RunAverage"]


class RunAverage:
    """The average of the model that is trained, or a loaded state that waits for its model.

    Args:
        settings: the options of the average.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._ema_model: EMAModel[nn.Module] | None = None
        self._loaded: Mapping[str, Any] | None = None  # a state that waits for its model
        self._go_on = False  # a state was loaded for the next train()
        self._begun_with: Mapping[str, Any] | None = None

    @property
    def exists(self) -> bool:
        """Whether training has begun or a state was loaded."""
        return self._ema_model is not None or self._loaded is not None

    @property
    def ema_model(self) -> EMAModel[nn.Module]:
        """The average together with its model.

        Raises:
            StateError: there is no average.
        """
        if self._ema_model is None:
            raise StateError("there is no average: train, or load a state and apply it to a model")
        return self._ema_model

    def fit(self, model: nn.Module | None) -> EMAModel[nn.Module]:
        """The average; a loaded state becomes the average of the first ``model`` that it fits."""
        if self._ema_model is None and self._loaded is not None and model is not None:
            average = with_settings(model, self.settings)
            average.load_state_dict(self._loaded)
            self._ema_model, self._loaded = average, None
        return self.ema_model

    def state(self) -> dict[str, Any]:
        """See :meth:`EMAModel.state_dict`."""
        if self._ema_model is None and self._loaded is not None:
            return dict(self._loaded)
        return self.ema_model.state_dict()

    def log_values(self, prefix: str) -> dict[str, float]:
        """The numbers that the logs show, or an empty mapping before there is an average.

        Args:
            prefix: begins each name in the logs.
        """
        if not self.exists:
            return {}
        average = self.ema_model
        values = {f"{prefix}_decay": average.decay, f"{prefix}_updates": average.count}
        with suppress(StateError):  # averages are swapped in
            values[f"{prefix}_distance"] = average.relative_distance()
        return values

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state`` when training begins, or keep it until there is a model."""
        with uninterrupted():
            if self._ema_model is not None:
                self._ema_model.load_state_dict(state)
            else:
                State.from_dict(state)  # raises now if the state is damaged
                self._loaded = state
            self._go_on = True

    def begin(self, model: nn.Module, *, again: bool, may_begin_again: bool) -> bool:
        """Start as a copy of the weights of ``model``, unless a state was loaded.

        Args:
            model: the model that is trained from now on.
            again: training begins once more within one ``train()``, so the state that was loaded
                for it is loaded again.
            may_begin_again: whether training may begin once more. If so, a loaded state is kept.

        Returns:
            Whether the average continues from a loaded state.
        """
        if again and self._begun_with is not None:
            self.load(self._begun_with)
        self._begun_with = None
        go_on = self._go_on or self._loaded is not None
        if self._ema_model is not None and self._ema_model.model is not model:
            if go_on:
                self._loaded = self._ema_model.state_dict()
            self._ema_model = None
        if self._loaded is not None:
            self.fit(model)
        elif self._ema_model is None:
            self._ema_model = with_settings(model, self.settings)
        elif not go_on:
            self._ema_model.reset()
        self._go_on = False
        if go_on and may_begin_again:
            self._begun_with = self.state()
        return go_on
