"""Detect optimizer steps that a gradient scaler skipped: the weights have not moved."""

from __future__ import annotations

from typing import Any

__all__ = ["SkippedSteps"]


class SkippedSteps:
    """Detects that the scaler found an overflow in the gradients of a step.

    Accelerate reports a skipped step only if the scaler did not call the optimizer. The scaler
    always calls a fused optimizer, the Trainer's default, which skips the step itself. In both
    cases the scale of the gradients drops.
    """

    def __init__(self) -> None:
        self._scale: float | None = None

    def before(self, optimizer: Any) -> None:
        """Remember the scale of the gradients before the step, if there is a scaler."""
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and self._scale is None:
            self._scale = scaler.get_scale()

    def skipped(self, optimizer: Any) -> bool:
        """Whether the last step was skipped."""
        scaler = getattr(optimizer, "scaler", None)
        if scaler is None:
            return False
        before, self._scale = self._scale, scaler.get_scale()
        return bool(optimizer.step_was_skipped) or (before is not None and self._scale < before)

    def forget(self) -> None:
        """Forget the scale, because another run begins."""
        self._scale = None
