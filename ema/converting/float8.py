"""Widen float8 weights to float32, which represents each of their values exactly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ema.checkpoint import Source
from ema.errors import CheckpointError

__all__ = ["FLOAT8", "widened"]

FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Dtypes to widen. A float8 average would never move: an update is smaller than its precision."""

_SCALES = ("_scale", "_scale_inv", "_scale_2", ".scale", ".scales")


def widened(tensors: Mapping[str, Source], beside: Mapping[str, Source]) -> dict[str, Source]:
    """Widen float8 tensors to float32.

    Args:
        tensors: the averages, by name.
        beside: all tensors of the source.

    Raises:
        CheckpointError: the source holds a scale for a float8 tensor, so its values are quantized.
    """
    for name, source in tensors.items():
        if source.dtype in FLOAT8 and (scale := _scale_of(name, beside)):
            raise CheckpointError(
                f"`{name}` is {source.dtype} with a scale beside it, `{scale}`: these weights are"
                " quantized; convert the checkpoint that was quantized"
            )
    return {
        name: Source("F32", source.shape, partial(_wide, source))
        if source.dtype in FLOAT8
        else source
        for name, source in tensors.items()
    }


def _scale_of(name: str, beside: Mapping[str, Source]) -> str | None:
    stem = name.removesuffix(".weight")
    return next((n for s in _SCALES for n in (name + s, stem + s) if n in beside), None)


def _wide(source: Source) -> Any:
    codes = np.frombuffer(source.read(), np.uint8)
    return _values(source.dtype)[codes]


def _values(dtype: str) -> Any:
    """The value of each of the 256 codes: ``(−1)^s · 2^(e − bias) · 1.m``, as in IEEE 754.

    E4M3 has no infinities, and is NaN if all bits but the sign are 1 (OCP, "8-bit floating point
    specification"). E5M2 is the upper half of a float16 and has both.
    """
    codes = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        return (codes << 8).view(np.float16).astype(np.float32)
    exponent, mantissa = (codes >> 3 & 15).astype(np.float32), (codes & 7).astype(np.float32)
    normal = np.exp2(exponent - 7) * (1 + mantissa / 8)
    values = np.where(exponent == 0, np.exp2(np.float32(-6)) * mantissa / 8, normal)
    values[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)
