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

    The sum of a leaf is finite only if all its numbers are finite, and a sum costs almost nothing.
    If the sum is not finite, each number is checked, because a sum of finite numbers may overflow.

    Args:
        leaves: floating-point arrays.
        stored: for each leaf, whether it is in memory in this dtype. Other leaves are widened
            first, and XLA would write out the wide copy to sum it, so they are not summed.

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
    """The smallest and the largest number of a leaf; both are NaN if the leaf holds NaN.

    XLA reads the leaf in place, while it would write out the result of ``isfinite``. One reduction
    computes both: then XLA gathers the results of all devices and reduces them again. It would
    reduce a single result in the network, and that may lose a NaN.
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
    """Refuse an update that is due if a parameter is not finite.

    Raises:
        ArgumentError: the values are not known, because JAX traces the update.
        StateError: a parameter holds NaN or Inf; the error names all such parameters.
    """
    if any(isinstance(x, jax.core.Tracer) for x in (due, *leaves)):
        raise ArgumentError(
            "`on_nonfinite` must not be 'raise' where the update is traced (jax.jit, lax.scan,"
            " lax.cond): a compiled step cannot raise. Use 'skip' there, and look at `skipped` of"
            " the state between steps"
        )
    if not due:
        return
    bad = [n for n, x in zip(names, leaves, strict=True) if not jnp.all(jnp.isfinite(x))]
    if bad:
        raise StateError(f"these parameters hold NaN or Inf, nothing was averaged: {listing(bad)}")
