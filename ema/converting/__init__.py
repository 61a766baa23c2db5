"""Convert averages that other libraries have saved to ``ema.safetensors``.

This package stands on top of both backends. It imports torch or JAX only for a source that needs it.
"""

from __future__ import annotations

from ema.converting.convert import BUFFERS, Conversion, convert

__all__ = ["BUFFERS", "Conversion", "convert"]
