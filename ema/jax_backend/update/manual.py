"""Find the mesh axes along which ``jax.shard_map`` has split an array over devices."""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

__all__ = ["split_axes", "varying"]


def varying(x: Any) -> frozenset[str]:
    """Mesh axes along which the array differs, as far as ``shard_map`` tracks them."""
    kind = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset() if kind is None else frozenset(kind.varying)


def split_axes(x: Any) -> frozenset[str]:
    """Mesh axes along which the array may differ: all axes if JAX does not track them.

    JAX does not track them with ``check_vma=False`` and under ``jax.pmap``.
    """
    axes = jax.sharding.get_abstract_mesh().manual_axes
    if all(varying(lax.axis_index(axis)) for axis in axes):
        return varying(x)
    return frozenset(axes)
