"""Averages that other libraries have saved, read and written as ``ema.safetensors``.

Sits on top of both backends, and imports torch or JAX only for a source that is theirs.
"""

from __future__ import annotations

from ema.converting.convert import BUFFERS, Conversion, convert

__all__ = ["BUFFERS", "Conversion", "convert"]
