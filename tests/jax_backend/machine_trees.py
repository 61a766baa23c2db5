"""Random trees of params: nested containers, boxes, scalars, holes, and any dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta
from hypothesis import strategies as st

__all__ = ["Leaf", "Pair", "TreeSpec", "specs"]

SHAPES = ((), (2,), (2, 3), (0,))
FLOATS = ("float32", "bfloat16", "float16", "complex64")


class Pair(NamedTuple):
    """A container whose parts have names."""

    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the tree.

    Attributes:
        kind: a dtype, ``"python float"``, ``"python int"``, ``"none"`` or ``"nothing"`` (a dict
            without entries).
        shape: of an array.
        boxed: whether it is in a box of linen.
    """

    kind: str
    shape: tuple[int, ...] = ()
    boxed: bool = False

    @property
    def averaged(self) -> bool:
        """Whether it is real or complex floating point."""
        return self.kind == "python float" or "float" in self.kind or "complex" in self.kind

    @property
    def array(self) -> bool:
        """Whether a step makes an array of it."""
        return self.kind not in {"none", "nothing"}

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of an array; JAX decides that of a Python number."""
        if self.kind == "python float":
            return jax.dtypes.canonicalize_dtype(np.float64)
        if self.kind == "python int":
            return jax.dtypes.canonicalize_dtype(np.int64)
        return jnp.dtype(self.kind)

    def value(self, seed: int) -> np.ndarray[Any, Any]:
        """Values of the size of 1 that depend on ``seed`` alone."""
        return self._drawn(np.random.default_rng(seed), 1.0)

    def gradient(self, seed: int) -> np.ndarray[Any, Any]:
        """Eighths between −1 and 1: optimizers add and halve them without rounding."""
        drawn = self._drawn(np.random.default_rng(seed), 3.0)
        if not self.averaged:
            return np.zeros_like(drawn)
        parts = np.clip(np.round(np.atleast_1d(drawn).astype(self._wide).view(np.float64)), -8, 8)
        eighths = (parts / 8).view(self._wide).reshape(drawn.shape)
        return np.asarray(eighths.astype(self.dtype))

    @property
    def _wide(self) -> type:
        return np.complex128 if self.dtype.kind == "c" else np.float64

    def _drawn(self, generator: np.random.Generator, scale: float) -> np.ndarray[Any, Any]:
        values = scale * generator.normal(size=(*self.shape, 2))
        if self.dtype.kind == "c":
            return np.asarray(values.view(np.complex128)[..., 0].astype(self.dtype))
        if self.dtype.kind in "iub":
            return np.asarray(np.round(3 * values[..., 0]).astype(self.dtype))
        return np.asarray(values[..., 0].astype(self.dtype))


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """A tree: a leaf, or a container of trees.

    Attributes:
        kind: ``"leaf"``, ``"dict"``, ``"list"``, ``"tuple"`` or ``"pair"``.
        leaf: of a leaf.
        children: of a container.
    """

    kind: str
    leaf: Leaf | None = None
    children: tuple[TreeSpec, ...] = ()

    def leaves(self) -> list[Leaf]:
        """In the order of the tree."""
        if self.leaf is not None:
            return [self.leaf]
        return [leaf for child in self.children for leaf in child.leaves()]

    def names(self, before: tuple[str, ...] = ()) -> list[str]:
        """The name of each leaf, with dots."""
        if self.leaf is not None:
            return [".".join(before)]
        keys = {"dict": "abcd", "pair": ("left", "right")}.get(self.kind, "0123")
        return [
            name
            for key, child in zip(keys, self.children, strict=False)
            for name in child.names((*before, key))
        ]

    def build(self, values: Sequence[Any], *, python: bool = False) -> Any:
        """The tree of these values, one for each leaf.

        Args:
            values: arrays; of holes they do not matter.
            python: whether Python numbers are to be such.
        """
        return self._build(iter(values), python=python)

    def _build(self, values: Any, *, python: bool) -> Any:
        if self.leaf is not None:
            return self._content(next(values), python=python)
        children = [child._build(values, python=python) for child in self.children]
        if self.kind == "dict":
            return dict(zip("abcd", children, strict=False))
        if self.kind == "pair":
            return Pair(*children)
        return children if self.kind == "list" else tuple(children)

    def _content(self, value: Any, *, python: bool) -> Any:
        if not self.leaf.array:
            return None if self.leaf.kind == "none" else {}
        if python and self.leaf.kind.startswith("python"):
            return value.item()
        if isinstance(value, np.ndarray):
            value = jnp.array(value)
        if not self.leaf.boxed:
            return value
        return meta.Partitioned(value, names=(None,) * len(self.leaf.shape))

    def flatten(self, tree: Any) -> list[Any]:
        """What is in the place of each leaf, without boxes; also ``MaskedNode``."""
        if self.leaf is not None:
            if isinstance(tree, meta.Partitioned):
                tree = tree.value
            return [None if self.leaf.kind == "nothing" and tree == {} else tree]
        if isinstance(tree, optax.MaskedNode):  # a mask may stand for a whole subtree
            return [tree] * len(self.leaves())
        kinds = {"dict": dict, "list": list, "tuple": tuple, "pair": Pair}
        assert type(tree) is kinds[self.kind], f"{type(tree)} in the place of a {self.kind}"
        children = tree.values() if self.kind == "dict" else tree
        return [
            leaf
            for child, part in zip(self.children, children, strict=True)
            for leaf in child.flatten(part)
        ]


def _spec(kind: str, children: list[TreeSpec]) -> TreeSpec:
    return TreeSpec(kind, children=tuple(children[:2] if kind == "pair" else children))


def specs(floats: tuple[str, ...] = FLOATS) -> st.SearchStrategy[TreeSpec]:
    """Trees of up to about five leaves; at least one can be averaged."""
    arrays = st.builds(
        Leaf, kind=st.sampled_from(floats), shape=st.sampled_from(SHAPES), boxed=st.booleans()
    )
    whole = st.builds(
        Leaf,
        kind=st.sampled_from(("int32", "uint8", "bool")),
        shape=st.sampled_from(((), (2,))),
        boxed=st.booleans(),
    )
    others = st.sampled_from(
        [Leaf(kind) for kind in ("python float", "python int", "none", "nothing")]
    )
    leaves = st.builds(TreeSpec, st.just("leaf"), st.one_of(arrays, arrays, whole, others))
    trees = st.recursive(
        leaves,
        lambda inner: st.builds(
            _spec,
            st.sampled_from(("dict", "list", "tuple", "pair")),
            st.lists(inner, min_size=2, max_size=3),
        ),
        max_leaves=5,
    )
    return trees.filter(lambda tree: any(leaf.averaged for leaf in tree.leaves()))
