"""Flatten trees of params once, with names for their leaves."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import optax

__all__ = ["Flat", "is_hole", "plain", "unboxed", "without_hooks"]


@dataclasses.dataclass(frozen=True)
class Flat:
    """A tree of params or averages, flattened; not a tree itself.

    Attributes:
        names: names of the leaves, with dots (``layers.0.kernel``). A leaf in a Variable or in a
            box has the name of the Variable or box.
        leaves: in the same order; ``None`` and ``optax.MaskedNode()`` are leaves too, called holes.
        structure: the structure of the tree, with a leaf for each hole.
    """

    names: list[str]
    leaves: list[Any]
    structure: Any

    @classmethod
    def of(cls, tree: Any) -> Flat:
        """Flatten a tree."""
        leaves, structure = jax.tree.flatten(tree, is_leaf=is_hole)
        paths, _ = jax.tree_util.tree_flatten_with_path(unboxed(plain(tree)), is_leaf=is_hole)
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
        return cls(names, leaves, structure)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and leaves, holes included."""
        return zip(self.names, self.leaves, strict=True)

    def pick(self, values: Iterable[Any] | None = None) -> list[Any]:
        """The leaves that are not holes, or the values that belong to these leaves.

        Args:
            values: one for each leaf, holes included; None stands for the leaves themselves.
        """
        chosen = self.leaves if values is None else values
        return [value for value, leaf in zip(chosen, self.leaves, strict=True) if not is_hole(leaf)]

    def fill(self, values: Iterable[Any]) -> Any:
        """The tree with new values for the leaves that are not holes; it undoes :meth:`pick`."""
        rest = iter(values)
        return self.structure.unflatten(
            [leaf if is_hole(leaf) else next(rest) for leaf in self.leaves]
        )


def is_hole(node: Any) -> bool:
    """Whether this is a hole: ``None``, or a leaf that is masked out."""
    return node is None or isinstance(node, optax.MaskedNode)


def unboxed(tree: Any) -> Any:
    """The tree with each of linen's boxes (``nn.Partitioned``) replaced by the leaf in it.

    A box is metadata around one leaf; names and files describe only the leaf.
    """
    meta = sys.modules.get("flax.core.meta")  # a program that holds a box has imported it
    if meta is None:
        return tree

    def content(node: Any) -> Any:
        while isinstance(node, meta.AxisMetadata):
            node = node.unbox()
        return node

    return jax.tree.map(
        content, tree, is_leaf=lambda node: is_hole(node) or isinstance(node, meta.AxisMetadata)
    )


def plain(tree: Any) -> Any:
    """The tree with arrays in place of nnx Variables."""
    nnx = sys.modules.get("flax.nnx")  # not imported here: a program with Variables has done it
    return tree if nnx is None else nnx.as_pure(tree)


def without_hooks(tree: Any) -> Any:
    """The tree without hooks on its nnx Variables: a hook shows another value than it stores.

    ``nnx.Optimizer`` builds the Variables of its state from the values that are shown.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree

    def plain_variable(node: Any) -> Any:
        if not isinstance(node, nnx.Variable):
            return node
        metadata = node.get_metadata()
        hooks = {name for name in metadata if name.startswith("on_")}
        if not hooks and type(node).get_value is nnx.Variable.get_value:
            return node
        kept = {name: value for name, value in metadata.items() if name not in hooks}
        return nnx.Variable.from_metadata(nnx.as_pure(node), {**kept, "ref": False})

    return jax.tree.map(plain_variable, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
