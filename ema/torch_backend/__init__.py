"""The PyTorch backend: ``EMAModel`` for any loop, ``EMACallback`` for the Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ema.extras import require

require("torch", "torch")

from ema.torch_backend.model import EMAModel

if TYPE_CHECKING:
    from ema.torch_backend.trainer import EMACallback

__all__ = ["EMACallback", "EMAModel"]


def __getattr__(name: str) -> Any:
    if name == "EMACallback":  # imports transformers, which few loops need
        from ema.torch_backend.trainer import EMACallback

        return EMACallback
    raise AttributeError(f"module 'ema.torch_backend' has no attribute {name!r}")
