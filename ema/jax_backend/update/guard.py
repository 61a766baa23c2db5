"""Checks for NaN and Inf in the parameters of an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ema.errors import ArgumentError, StateError, listing
from ema.jax_backend.update.manual import split_axes

__all__ = ["all_finite", "raise_where_not_finite"]


def all_finite(leaves: Sequence[jax.Array], stored: Sequence[bool]) -> jax.Array:
    """Whether no leaf holds NaN or Inf.

    A sum is finite only if all of it is, and costs next to nothing; where it is not, which a large
    sum of finite numbers may be too, each number is looked at.

    Args:
        leaves: floating-point arrays.
        stored: whether each is in memory as it is. Of others, which are widened on the way, XLA
            would write out a copy to sum it.

    Returns:
        A bool scalar, the same on all devices.
    """
    sums = [
        (leaf, s and not jnp.iscomplexobj(leaf)) for leaf, s in zip(leaves, stored, strict=True)
    ]
    whole = [leaf for leaf, summed in sums if summed]
    one_by_one = [jnp.all(jnp.isfinite(leaf)) for leaf, summed in sums if not summed]
    likely = [jnp.isfinite(jnp.sum(leaf)) for leaf in whole]
    finite = _all(one_by_one)
    return finite & lax.cond(_all(likely), _yes, _look, whole) if whole else finite


def _yes(leaves: list[jax.Array]) -> jax.Array:
    del leaves
    return jnp.array(True)


def _look(leaves: list[jax.Array]) -> jax.Array:
    return _all([jnp.isfinite(end) for leaf in leaves for end in _ends(leaf)])


def _ends(leaf: jax.Array) -> Sequence[jax.Array]:
    """Least and largest, NaN where there is one; read where it lies, isfinite would be written out.

    Both in one reduction, of which XLA gathers the results of the devices and reduces those again.
    Of one alone they would be reduced in the network, where a NaN may be lost.
    """
    zero = jnp.zeros((), leaf.dtype)
    ends: Sequence[jax.Array] = lax.reduce(
        (leaf, leaf), (zero, zero), _wider, tuple(range(leaf.ndim))
    )
    return ends


def _wider(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    return lax.min(a[0], b[0]), lax.max(a[1], b[1])


def _all(flags: Sequence[jax.Array]) -> jax.Array:
    result = jnp.array(True)
    for flag in flags:
        result &= flag
    if axes := split_axes(result):
        bad = lax.psum((~result).astype(jnp.int32), tuple(sorted(axes)))  # type: ignore[no-untyped-call]
        result = bad == 0
    return result


def raise_where_not_finite(
    due: jax.Array, names: Sequence[str], leaves: Sequence[jax.Array]
) -> None:
    """Refuse an update that is due where a parameter is not finite.

    Raises:
        ArgumentError: the values are not known, since this is being traced.
        StateError: names the parameters that hold NaN or Inf.
    """
    if any(isinstance(x, jax.core.Tracer) for x in (due, *leaves)):
        raise ArgumentError(
            "`on_nonfinite` must not be 'raise' where the update is traced (jax.jit, lax.scan,"
            " lax.cond): a compiled step cannot raise. Take 'skip' there, and look at `skipped` of"
            " the state between steps"
        )
    if not due:
        return
    bad = [n for n, x in zip(names, leaves, strict=True) if not jnp.all(jnp.isfinite(x))]
    if bad:
        raise StateError(f"these parameters hold NaN or Inf, nothing was averaged: {listing(bad)}")
