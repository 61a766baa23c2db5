"""One pass over all leaves, for a step that updates the averages and for a step that does not.

The equation of a leaf depends on whether it has a remainder, a bfloat16 average or a key. ``sweep``
and ``keep`` are functions of the module, so that an eager ``lax.cond`` reuses compiled branches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ema.jax_backend.selection import widen
from ema.jax_backend.settings import NARROW
from ema.jax_backend.update.equation import lerp, lerp_compensated, lerp_narrow
from ema.jax_backend.update.guard import all_finite

__all__ = ["Kept", "keep", "real_dtype", "sweep"]

_SMALL = 256
"""Largest size that is flattened; arrays that lose the fused multiply-add are far smaller."""

Weights = list[dict[str, jax.Array]]
Keys = list[jax.Array | None]


class Kept(NamedTuple):
    """The values that a step passes to the next step: by average, then by leaf.

    Attributes:
        averages: all averages of a leaf have the same shape and dtype.
        remainders: likewise; None for an average without a remainder.
    """

    averages: list[list[Any]]
    remainders: list[list[Any]]


def sweep(
    kept: Kept, params: list[Any], weights: Weights, keys: Keys, anyway: jax.Array | None
) -> tuple[Kept, jax.Array | None]:
    """Update every average.

    Args:
        kept: averages and remainders before the update.
        params: the live leaves after the step, in their own dtypes.
        weights: weights of each average, by the dtype of the arithmetic.
        keys: a key for each leaf whose average is rounded at random; None for other leaves.
        anyway: whether to update even if a parameter is not finite; None makes no check.

    Returns:
        Averages and remainders after the update, and whether it was made (None without a check).
    """
    # all averages of a leaf share one read and widened copy of it
    wide = [
        _placed_as(average, widen(leaf, _wide_dtype(average)))
        for average, leaf in zip(kept.averages[0], params, strict=True)
    ]
    made = None
    if anyway is not None:
        stored = [jnp.result_type(leaf) == w.dtype for leaf, w in zip(params, wide, strict=True)]
        made = anyway | all_finite(wide, stored)
    updates = [_flat if _is_small(leaf) else _one for leaf in params]
    averages, remainders = [], []
    for before, lost, weight in zip(kept.averages, kept.remainders, weights, strict=True):
        after = [
            update(a, c, leaf, weight[real_dtype(a)], key)
            for a, c, leaf, key, update in zip(before, lost, wide, keys, updates, strict=True)
        ]
        averages.append([a for a, _ in after])
        remainders.append([c for _, c in after])
    moved = Kept(averages, remainders)
    if made is not None:
        moved = jax.tree.map(lambda new, old: jnp.where(made, new, old), moved, kept)
    return moved, made


def keep(
    kept: Kept, params: list[Any], weights: Weights, keys: Keys, anyway: jax.Array | None
) -> tuple[Kept, jax.Array | None]:
    """The other branch: no update is due, so nothing changes."""
    del params, weights, keys
    return kept, None if anyway is None else jnp.array(True)


def _is_small(params: Any) -> bool:
    """Whether XLA would lose the fused multiply-add of a leaf, see :func:`_flat`."""
    return (
        jax.__version_info__ >= (0, 12)
        and jnp.ndim(params) > 1
        and jnp.size(params) <= _SMALL
        and jnp.result_type(params).itemsize < 4
        and not any(
            jax.typeof(params).sharding.spec
        )  # a leaf that is split over named axes cannot be reshaped
    )


def _flat(
    average: Any, remainder: Any, params: jax.Array, weight: jax.Array, key: jax.Array | None
) -> tuple[Any, Any]:
    """The same update on arrays flattened to one row, behind a barrier.

    In the steps that JAX 0.12 compiles for a CPU, small bfloat16 and float16 arrays of several axes
    lose the fused multiply-add, and then the last bit differs.
    """
    shape = params.shape
    row = lax.optimization_barrier(params.reshape(-1))  # type: ignore[no-untyped-call]
    lost = None if remainder is None else remainder.reshape(-1)
    moved, lost = _one(average.reshape(-1), lost, row, weight, key)
    return moved.reshape(shape), None if lost is None else lost.reshape(shape)


def _one(
    average: Any, remainder: Any, params: jax.Array, weight: jax.Array, key: jax.Array | None
) -> tuple[Any, Any]:
    if remainder is not None:
        moved, lost = lerp_compensated(average, remainder, params, weight)
        return moved, lost
    if jnp.result_type(average) == NARROW:
        return lerp_narrow(average, params, weight, key), None
    return lerp(average, params, weight), None


def _placed_as(average: Any, params: jax.Array) -> jax.Array:
    """``params`` with the sharding of its average: on explicit meshes operands must share one.

    A program may spread averages over devices that all hold the whole parameter (ZeRO-1).
    """
    here, there = jax.typeof(params).sharding, jax.typeof(average).sharding
    if here.spec == there.spec or here.mesh != there.mesh:
        return params
    moved: jax.Array = jax.sharding.reshard(params, there)  # type: ignore[no-untyped-call]
    return moved


def real_dtype(average: Any) -> str:
    """Name of the weight's dtype: the real dtype of the arithmetic on this average."""
    return str(np.zeros((), _wide_dtype(average)).real.dtype)


def _wide_dtype(average: Any) -> np.dtype[Any]:
    """The dtype of the arithmetic on an average."""
    dtype: np.dtype[Any] = jnp.result_type(average)
    return np.dtype(np.float32) if dtype == NARROW else dtype
