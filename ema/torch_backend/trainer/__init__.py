"""Hugging Face Trainer: ``EMACallback``, and a function that finds complete checkpoints."""

from __future__ import annotations

from ema.extras import require

require("transformers", "transformers")

from ema.torch_backend.trainer.callback import EMACallback
from ema.torch_backend.trainer.run_folder import last_complete_checkpoint

__all__ = ["EMACallback", "last_complete_checkpoint"]
