"""Read an ``nnx.EMA`` in memory."""

from __future__ import annotations

from typing import Any

from flax import nnx

from ema.checkpoint import Source
from ema.converting.found import Found
from ema.jax_backend.saving.files import source_of
from ema.jax_backend.selection import is_inexact
from ema.jax_backend.trees import Flat, is_hole

__all__ = ["read_nnx"]


def read_nnx(average: Any) -> Found:
    """The averages of an ``nnx.EMA``, which does not count steps."""
    tensors: dict[str, Source] = {
        name: source_of(name, leaf)
        for name, leaf in Flat.of(nnx.to_pure_dict(average.params)).items()
        if not is_hole(leaf) and is_inexact(leaf)
    }
    return Found(kind="nnx.EMA", tensors=tensors)
