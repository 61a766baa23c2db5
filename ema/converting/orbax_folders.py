"""Orbax folders: find the checkpoint that a path means, and read its tensors a few at a time.

A path may be a run with several steps, a step with several items, or one item. A ``CheckpointManager``
writes ``run/7/default``: a run, a step, an item. ``ocp.args.Composite`` names the items of a step. A
checkpointer without a manager writes one item alone. ``flax.training.checkpoints`` writes
``run/checkpoint_7``, either an item or a msgpack file.

Finding a checkpoint needs neither JAX nor Orbax; reading one needs both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ema.converting.found import Found
from ema.converting.leaves import DTYPES, Bound, Leaf, Unread
from ema.converting.train_states import found_in
from ema.errors import CheckpointError, listing
from ema.extras import require

__all__ = ["OrbaxCheckpoint", "find_checkpoint", "read_checkpoint"]

_NEUTRAL = {"default", "pytree", "state"}
"""Item names that say nothing about the content: Orbax's defaults, and common choices."""

_UNFINISHED = ".orbax-checkpoint-tmp"

_BATCH = 64 << 20
"""Bytes to restore at once. Batches save time: each restore reads the metadata of the whole tree again."""


# --- find -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OrbaxCheckpoint:
    """The checkpoint that a path means.

    Attributes:
        items: the folder of each item, by the item's name; ``""`` is the name of a single item that
            has no telling name.
        file: a msgpack file, if the step is one; then there are no items.
        notes: messages for the user, such as the step that was chosen.
    """

    items: dict[str, Path]
    file: Path | None = None
    notes: tuple[str, ...] = ()


def find_checkpoint(folder: Path) -> OrbaxCheckpoint | None:
    """Find the checkpoint in a folder; None if neither Orbax nor Flax wrote the folder.

    Raises:
        CheckpointError: the save did not finish, or the folder holds several runs.
    """
    if _UNFINISHED in folder.name:
        raise CheckpointError("Orbax has not finished this save: take another step")
    if _is_item(folder):
        in_step = (folder.absolute().parent / "_CHECKPOINT_METADATA").is_file()
        named = in_step and folder.absolute().name not in _NEUTRAL
        return OrbaxCheckpoint({folder.absolute().name if named else "": folder})
    children = sorted(child for child in folder.iterdir() if _UNFINISHED not in child.name)
    if (items := [child for child in children if _is_item(child)]) and (
        (folder / "_CHECKPOINT_METADATA").is_file() or not all(map(_step_of, items))
    ):
        if len(items) == 1 and items[0].name in _NEUTRAL:
            return OrbaxCheckpoint({"": items[0]})
        return OrbaxCheckpoint({item.name: item for item in items})
    return _latest(children)


def _latest(children: list[Path]) -> OrbaxCheckpoint | None:
    """The latest step among the folders of a run; None if there is no step."""
    steps: dict[str, list[tuple[int, Path]]] = {}
    for child in children:
        if (step := _step_of(child)) is not None and _is_checkpoint(child):
            steps.setdefault(step[0], []).append((step[1], child))
    if not steps:
        return None
    if len(steps) > 1:
        names = listing(child.name for group in steps.values() for _, child in group)
        raise CheckpointError(f"it holds several runs: name one of {names}")
    (group,) = steps.values()
    _, latest = max(group)
    found = OrbaxCheckpoint({}, file=latest) if latest.is_file() else find_checkpoint(latest)
    if found is None:  # pragma: no cover - _is_checkpoint excludes this
        return None
    others = listing(child.name for _, child in sorted(group) if child != latest)
    note = f"`{latest.name}` is taken, the latest step"
    note += f"; name the folder of another one to take that: {others}" if others else ""
    return dataclasses.replace(found, notes=(note,))


def _is_item(folder: Path) -> bool:
    return (folder / "_METADATA").is_file() or (folder / "manifest.ocdbt").is_file()


def _is_checkpoint(child: Path) -> bool:
    if child.is_dir():
        return _is_item(child) or any(map(_is_item, child.iterdir()))
    return re.fullmatch(r"checkpoint_\d+", child.name) is not None


def _step_of(child: Path) -> tuple[str, int] | None:
    """The prefix of a step's name, and its number."""
    match = re.fullmatch(r"(|.*[_.-])(\d{1,18})", child.name)
    return match and (match[1], int(match[2]))


# --- read -----------------------------------------------------------------------------------------


def read_checkpoint(
    checkpoint: OrbaxCheckpoint,
    *,
    name: str | None,
    key: str | None,
    averaged: bool,
    max_bytes: int | None,
) -> Found:
    """Find the average of a train state, of an optimizer state with ``params_ema``, or of an ``EMA``.

    This reads only metadata and counters. Each tensor is read when it is written to the new file.

    Raises:
        ArgumentError: there are several averages, and ``name`` does not choose one of them.
        CheckpointError: Orbax cannot read the checkpoint, its averages are larger than ``max_bytes``, or
            it does not hold exactly one average.
        MissingExtraError: Orbax is not installed.
    """
    require("orbax.checkpoint", "jax")
    files = [file for folder in checkpoint.items.values() for file in folder.rglob("*")]
    bound = Bound(sum(file.stat().st_size for file in files if file.is_file()), max_bytes)
    items = {item: _Item(folder, bound).tree() for item, folder in checkpoint.items.items()}
    tree = items.get("", items)
    return found_in(tree, "Orbax", name=name, key=key, averaged=averaged)


class _Item:
    """The tree of one folder. Restores tensors in the order in which they are written."""

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
        """The tree, with a ``Leaf`` for each array."""
        import jax

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
            return f"a {type(entry).__name__}"  # a string, or a key of jax.random
        if dtype.name not in DTYPES:
            return Unread(f"is an array of dtype {dtype.name}, which safetensors lacks")
        return Leaf(
            dtype.name, tuple(shape), partial(self._read, index), partial(self._plan, index)
        )

    def _plan(self, index: int, order: tuple[int, str]) -> None:
        self._bound.add(self._sizes[index], order)
        self._order[index] = order

    def _read(self, index: int) -> Any:
        """The elements of an array. Restores the arrays that are read next along with it."""
        if index not in self._arrays:
            self._arrays |= self._restore(self._batch(index))
        return np.ascontiguousarray(self._arrays.pop(index)).reshape(-1).view(np.uint8)

    def _batch(self, index: int) -> list[int]:
        """The array at ``index``, and those that are read after it and fit into one batch."""
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
        """Restore only these arrays of the tree."""
        import jax
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

    # not a Checkpointer: it also looks for metadata of a step, and hides why it cannot read a tree's
    handler = ocp.PyTreeCheckpointHandler()
    try:
        return do(handler)
    except Exception as error:  # Orbax does not document what it raises for a damaged checkpoint
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"Orbax cannot read it: {type(error).__name__}: {reason:.300}"
        ) from None
    finally:
        handler.close()
