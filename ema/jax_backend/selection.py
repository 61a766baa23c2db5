"""Select which leaves of a tree of parameters are averaged, and in which dtypes.

Every inexact leaf (real or complex floating point) is averaged. In place of other leaves (integers,
bools, PRNG keys) the average holds ``optax.MaskedNode()``, as ``optax.masked`` does. A
``MaskedNode`` or ``None`` among the parameters stays as it is.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ema.errors import ArgumentError, ModelError, difference
from ema.jax_backend.trees import Flat, is_hole

__all__ = [
    "accumulator_of",
    "initial_average",
    "initial_remainder",
    "is_array",
    "is_inexact",
    "new_params",
    "require_alike",
    "require_match",
    "widen",
]

MANTISSA_BITS = {jnp.dtype(jnp.bfloat16): 7, jnp.dtype(jnp.float32): 23}
"""The dtypes with the 8 exponent bits of float32; XLA flushes their subnormals anyway."""


def is_inexact(leaf: Any) -> bool:
    """Whether the leaf is averaged: real or complex floating point, also a Python number.

    Other objects in a tree (functions, strings) are left alone, like integers.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float | complex)
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def is_array(leaf: Any) -> bool:
    """Whether the leaf is an array and not a Python or NumPy number."""
    return isinstance(leaf, jax.Array | np.ndarray)


def accumulator_of(leaf: Any, chosen: np.dtype[Any] | None) -> np.dtype[Any]:
    """The dtype in which a leaf is averaged: the chosen one, or else float32 or wider.

    Raises:
        ArgumentError: float64 was chosen while JAX is restricted to 32 bits.
    """
    dtype = jnp.result_type(leaf)
    if chosen is None:
        # NumPy's promotion, because JAX's own raises under strict promotion.
        return np.promote_types(dtype, np.float32)
    if jax.dtypes.canonicalize_dtype(chosen) != chosen:
        raise ArgumentError(
            f"`accumulator_dtype` must have at most 32 bits while JAX is restricted to them, got"
            f' {chosen}: call jax.config.update("jax_enable_x64", True) first'
        )
    if np.dtype(dtype).kind == "c":  # there is no complex dtype narrower than complex64
        return np.promote_types(chosen if chosen.itemsize > 4 else np.float32, np.complex64)
    return chosen


def initial_average(params: Any, chosen: np.dtype[Any] | None) -> Any:
    """Copies of the inexact leaves in the accumulator's dtype; they never alias a parameter.

    Abstract leaves (``jax.ShapeDtypeStruct``) give abstract averages.

    Raises:
        ModelError: the tree has leaves, but none of them can be averaged.
    """
    flat = Flat.of(params)
    present = flat.pick()
    # A tree without leaves is fine: under optax.masked and optax.partition a group may be empty.
    if present and not any(map(is_inexact, present)):
        dtypes = sorted({_kind(leaf) for leaf in present})
        raise ModelError(
            "`params` must hold a floating-point leaf to average,"
            f" got {len(present)} of dtype {', '.join(dtypes)}"
        )
    return flat.fill(_initial_leaf(leaf, chosen) for leaf in present)


def _initial_leaf(leaf: Any, chosen: np.dtype[Any] | None) -> Any:
    if not is_inexact(leaf):
        return optax.MaskedNode()
    dtype = accumulator_of(leaf, chosen)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
            leaf.shape, dtype, sharding=leaf.sharding
        )
    # copy=True: astype and asarray may alias, and then a step that donates both trees fails.
    return jnp.array(leaf, dtype=dtype, copy=True)


def initial_remainder(average: Any) -> Any:
    """Zeros of the shapes and dtypes of an average, which may be abstract."""

    def zeros(leaf: Any) -> Any:
        if is_hole(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        # computed from the leaf, so that a compiler that chooses placements places both alike
        return jnp.where(jnp.zeros_like(leaf, bool), leaf, jnp.zeros_like(leaf))

    return jax.tree.map(zeros, average, is_leaf=is_hole)


def require_alike(average: Flat, remainder: Flat) -> None:
    """Refuse a remainder that does not match this average.

    Raises:
        ModelError: it has other leaves, or a leaf of another shape or dtype.
    """
    wrong = [
        f"`{name}` has a remainder of {_describe(c)}, its average is {_describe(a)}"
        for (name, a), c in zip(average.items(), remainder.leaves, strict=False)
        if _describe(a) != _describe(c)
    ]
    if average.structure != remainder.structure or wrong:
        ours, theirs = set(average.names), set(remainder.names)
        missing, unexpected = ours - theirs, theirs - ours
        raise ModelError(
            "the remainder does not match the average: "
            + (difference(sorted(missing), sorted(unexpected), wrong) or "other containers")
        )


def _describe(leaf: Any) -> str:
    return "nothing" if is_hole(leaf) else f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def require_match(average: Flat, params: Flat, chosen: np.dtype[Any] | None) -> None:
    """Refuse parameters that do not match the average.

    Raises:
        ModelError: lists every leaf that is missing, unexpected, or of another shape or dtype.
    """
    theirs, ours = average.names, params.names
    if theirs != ours:
        separates = difference(
            [name for name in theirs if name not in set(ours)],
            [name for name in ours if name not in set(theirs)],
        )
        raise ModelError(
            "`params` do not match the average: "
            + (separates or "the same leaves in another order")
        )
    if average.structure != params.structure:
        raise ModelError(
            "`params` do not match the average: the same leaves in other containers,"
            f" {params.structure} in place of {average.structure}"
        )
    pairs = zip(ours, average.leaves, params.leaves, strict=True)
    wrong = [text for pair in pairs if (text := _mismatch(*pair, chosen))]
    if wrong:
        raise ModelError(f"`params` do not match the average: {difference([], [], wrong)}")


def _kind(leaf: Any) -> str:
    """The dtype of a number, or the class of anything else."""
    number = hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)
    return str(jnp.result_type(leaf)) if number else type(leaf).__name__


def _mismatch(name: str, average: Any, leaf: Any, chosen: np.dtype[Any] | None) -> str:
    """The difference between a parameter and its average in words; empty if they fit."""
    if is_hole(average) or not is_inexact(leaf):
        if is_hole(average) and not (is_inexact(leaf) and is_array(leaf)):
            return ""  # programs filter out what they do not train, Python numbers too
        kinds = ["nothing" if is_hole(x) else _kind(x) for x in (leaf, average)]
        return f"`{name}` is {kinds[0]}, its average is {kinds[1]}"
    if jnp.shape(average) != jnp.shape(leaf):
        return f"`{name}` has shape {jnp.shape(leaf)}, its average has {jnp.shape(average)}"
    expected = accumulator_of(leaf, chosen)
    if (found := jnp.result_type(average)) != expected:
        return f"`{name}` is averaged in {expected}, the state has {found}"
    return ""


def new_params(leaf: Any, update: Any) -> Any:
    """The parameter after the step, by the same expression as in ``optax.apply_updates``.

    XLA then computes it once for both. A missing update (``None``, masked, or the float0 that JAX
    gives as the gradient of an integer) leaves the parameter as it is.
    """
    if is_hole(update) or jnp.result_type(update) == jax.dtypes.float0:
        return leaf
    return jnp.asarray(leaf + update).astype(jnp.asarray(leaf).dtype)


def widen(leaf: Any, dtype: np.dtype[Any]) -> jax.Array:
    """The parameter in the accumulator's dtype, exactly as stored: rounded to its own dtype first.

    XLA treats ``float32 → bfloat16 → float32`` as the identity and would average the optimizer's
    values before rounding (an error of 3e-3); XLA must obey ``reduce_precision``. But
    ``reduce_precision`` flushes subnormals, and these are ordinary weights in float16 (below 6e-5)
    and float8. XLA on the CPU does not skip the conversions of these two, so they do not need it.
    """
    stored = jnp.asarray(leaf).dtype
    wide = jnp.asarray(leaf).astype(dtype)
    if stored == dtype or stored not in MANTISSA_BITS:
        return wide
    return lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=MANTISSA_BITS[stored])
