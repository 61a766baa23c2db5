"""Optimizer steps that a gradient scaler skipped: the weights have not moved."""

from __future__ import annotations

from typing import Any

__all__ = ["SkippedSteps"]


class SkippedSteps:
    """Whether the scaler found an overflow in the gradients of a step.

    Accelerate says so only of optimizers that the scaler does not call then; a fused one, the
    default of the Trainer, is always called and skips by itself. The scale tells in any case:
    it drops.
    """

    def __init__(self) -> None:
        self._scale: float | None = None

    def before(self, optimizer: Any) -> None:
        """Remember the scale of the gradients before the step, if there is one."""
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and self._scale is None:
            self._scale = scaler.get_scale()

    def skipped(self, optimizer: Any) -> bool:
        """Whether the step that has been made was none."""
        scaler = getattr(optimizer, "scaler", None)
        if scaler is None:
            return False
        before, self._scale = self._scale, scaler.get_scale()
        return bool(optimizer.step_was_skipped) or (before is not None and self._scale < before)

    def forget(self) -> None:
        """Another run begins."""
        self._scale = None
