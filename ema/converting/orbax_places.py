"""The Orbax folder that a path means: a run of several steps, a step of several items, or an item.

A ``CheckpointManager`` writes ``run/7/default``: a run, a step, an item. The items of a step have the
names that ``ocp.args.Composite`` gave them; a checkpointer without a manager writes an item alone, and
``flax.training.checkpoints`` writes ``run/checkpoint_7``, an item or a file of msgpack.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from ema.errors import CheckpointError, listing

__all__ = ["Place", "place_of"]

_NEUTRAL = {"default", "pytree", "state"}
"""Names of items that Orbax or everybody gives, and that say nothing of what is in them."""

_UNFINISHED = ".orbax-checkpoint-tmp"


@dataclasses.dataclass(frozen=True)
class Place:
    """The meaning of a path.

    Attributes:
        items: folders by the names of the items; ``""`` for the only one of no name.
        file: a file of msgpack in place of the items.
        notes: what the user should know: which step was taken.
    """

    items: dict[str, Path]
    file: Path | None = None
    notes: tuple[str, ...] = ()


def place_of(folder: Path) -> Place | None:
    """The items that a folder means; None if Orbax and Flax did not write it.

    Raises:
        CheckpointError: the save did not finish, or it holds several runs.
    """
    if _UNFINISHED in folder.name:
        raise CheckpointError("Orbax has not finished this save: take another step")
    if _is_item(folder):
        in_step = (folder.absolute().parent / "_CHECKPOINT_METADATA").is_file()
        named = in_step and folder.absolute().name not in _NEUTRAL
        return Place({folder.absolute().name if named else "": folder})
    children = sorted(child for child in folder.iterdir() if _UNFINISHED not in child.name)
    if (items := [child for child in children if _is_item(child)]) and (
        (folder / "_CHECKPOINT_METADATA").is_file() or not all(map(_step_of, items))
    ):
        if len(items) == 1 and items[0].name in _NEUTRAL:
            return Place({"": items[0]})
        return Place({item.name: item for item in items})
    return _latest(children)


def _latest(children: list[Path]) -> Place | None:
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
    found = Place({}, file=latest) if latest.is_file() else place_of(latest)
    if found is None:  # pragma: no cover - _is_checkpoint has looked
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
