"""Orbax folders: told by their metadata, and read a few tensors at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ema.converting.found import Found
from ema.converting.leaves import DTYPES, Bound, Leaf, Unread
from ema.converting.orbax_places import Place
from ema.converting.train_states import found_in
from ema.errors import CheckpointError

__all__ = ["read_place"]

_BATCH = 64 << 20
"""Bytes that are restored at once: each restore reads the metadata of the whole tree again."""


def read_place(
    place: Place, *, name: str | None, key: str | None, averaged: bool, max_bytes: int | None
) -> Found:
    """The average of a train state, of an optimizer's state with ``params_ema``, or of an ``EMA``.

    Only the metadata and the counters are read here; the tensors when they are written.

    Raises:
        ArgumentError: there are several averages, and ``name`` names another one.
        CheckpointError: Orbax cannot read it, it would become larger than ``max_bytes``, or it holds no
            average, or several.
    """
    files = [file for folder in place.items.values() for file in folder.rglob("*")]
    bound = Bound(sum(file.stat().st_size for file in files if file.is_file()), max_bytes)
    items = {item: _Item(folder, bound).tree() for item, folder in place.items.items()}
    tree = items.get("", items)
    return found_in(tree, "Orbax", name=name, key=key, averaged=averaged)


class _Item:
    """The tree of one folder; tensors are restored in the order in which they will be written."""

    def __init__(self, folder: Path, bound: Bound) -> None:
        from etils.epath import Path as OrbaxPath

        self._folder = OrbaxPath(folder.absolute())
        self._metadata = _orbax(lambda handler: handler.metadata(self._folder).tree)
        self._bound = bound
        self._sizes: list[int] = []
        self._counters: list[int] = []
        self._order: dict[int, tuple[int, str]] = {}
        self._arrays: dict[int, Any] = {}

    def tree(self) -> Any:
        """The tree with a ``Leaf`` in the place of each array."""
        structure: Any
        entries, structure = jax.tree.flatten(self._metadata)
        leaves = [self._leaf(index, entry) for index, entry in enumerate(entries)]
        self._sizes = [leaf.nbytes if isinstance(leaf, Leaf) else 0 for leaf in leaves]
        self._counters = [
            index
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, Leaf) and leaf.shape == () and not leaf.is_average
        ]
        return structure.unflatten(leaves)

    def _leaf(self, index: int, entry: Any) -> Any:
        dtype, shape = getattr(entry, "dtype", None), getattr(entry, "shape", None)
        if not isinstance(dtype, np.dtype) or shape is None:
            return f"a {type(entry).__name__}"  # a string, a key of jax.random
        if dtype.name not in DTYPES:
            return Unread(f"is an array of dtype {dtype.name}, which safetensors lacks")
        return Leaf(
            dtype.name, tuple(shape), partial(self._read, index), partial(self._plan, index)
        )

    def _plan(self, index: int, order: tuple[int, str]) -> None:
        self._bound.add(self._sizes[index], order)
        self._order[index] = order

    def _read(self, index: int) -> Any:
        """The elements of an array; those that will be next are restored along with it."""
        if index not in self._arrays:
            self._arrays |= self._restore(self._batch(index))
        return np.ascontiguousarray(self._arrays.pop(index)).reshape(-1).view(np.uint8)

    def _batch(self, index: int) -> list[int]:
        if index not in self._order:
            return self._counters if index in self._counters else [index]
        batch, size, first = [index], self._sizes[index], self._order.pop(index)
        later = [other for other, order in self._order.items() if order > first]
        for other in sorted(later, key=self._order.__getitem__):
            size += self._sizes[other]
            if size > _BATCH:
                break
            batch.append(other)
        for other in batch[1:]:
            del self._order[other]
        return batch

    def _restore(self, indices: list[int]) -> dict[int, Any]:
        """These arrays out of the tree, and nothing else of it."""
        import orbax.checkpoint as ocp

        wanted = set(indices)
        structure: Any
        entries, structure = jax.tree.flatten(self._metadata)
        item = [0 if index in wanted else ocp.PLACEHOLDER for index in range(len(entries))]
        as_numpy = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(entries)
        arguments = ocp.args.PyTreeRestore(
            item=structure.unflatten(item), restore_args=structure.unflatten(as_numpy)
        )
        restored = jax.tree.leaves(
            _orbax(lambda handler: handler.restore(self._folder, args=arguments))
        )
        return {index: np.asarray(restored[index]) for index in indices}


def _orbax(do: Callable[[Any], Any]) -> Any:
    import orbax.checkpoint as ocp

    # a Checkpointer would look for metadata of a step, and keep to itself why it cannot read those of a tree
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return do(handler)
    except Exception as error:  # what a damaged checkpoint raises is not said anywhere
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"Orbax cannot read it: {type(error).__name__}: {reason:.300}"
        ) from None
    finally:
        handler.close()
