"""Checkpoints as trees: their parts, their tensors, and the names of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ema.errors import CheckpointError, listing, shortened

__all__ = [
    "Chosen",
    "IsTensor",
    "KeyPath",
    "Named",
    "children",
    "described_parts",
    "flattened",
    "mostly",
    "named",
    "shape_of",
    "subtree",
    "without_shared_prefixes",
]

KeyPath = tuple[str, ...]
IsTensor = Callable[[Any], bool]
Named = tuple[str, tuple[int, ...]]
"""The name and the shape of a tensor."""

_WRAPPED = ("module.", "_orig_mod.")
_TOO_DEEP = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """Where the average lies in a tree.

    Attributes:
        path: the keys from the top to the mapping that holds the averages; ``()`` is the whole tree.
        kind: a short description, for messages.
        names: the name in the mapping for each new name, if the mapping is flat and holds other tensors
            too. None if all its tensors are averages and keep their names.
        beside: values near the averages, such as counters, by name.
        at_users_word: only the user says that these are averages; the tree does not.
        notes: what the user should know.
    """

    path: KeyPath
    kind: str
    names: Mapping[str, str] | None = None
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at_users_word: bool = False
    notes: tuple[str, ...] = ()


def subtree(tree: Any, path: KeyPath) -> Any:
    """The node at the end of a path."""
    for step in path:
        tree = dict(children(tree))[step]
    return tree


def described_parts(tree: Any, is_tensor: IsTensor) -> str:
    """Describe the parts of a checkpoint in a few words, for messages."""
    if not isinstance(tree, Mapping):
        return f"a {type(tree).__name__}"
    parts = []
    direct = [name for name, value in tree.items() if is_tensor(value)]
    for name, value in tree.items():
        if not is_tensor(value):
            number = sum(1 for _ in flattened(value, is_tensor))
            parts.append(
                f"`{shortened(str(name), 60)}`" + (f" ({number} tensors)" if number else "")
            )
    if direct:
        parts.insert(0, f"{len(direct)} tensors ({listing(direct, 3)})")
    text = ", ".join(parts[:12])
    return f"{text} and {len(parts) - 12} more" if len(parts) > 12 else text or "nothing"


def flattened(tree: Any, is_tensor: IsTensor, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the tensors of a tree with their paths."""
    if is_tensor(tree):
        yield path, tree
        return
    if len(path) > _TOO_DEEP:
        raise CheckpointError(f"it is nested deeper than {_TOO_DEEP} levels, or holds itself")
    for name, child in children(tree):
        yield from flattened(child, is_tensor, (*path, name))


def without_shared_prefixes(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """Remove the prefixes that DDP and ``torch.compile`` add, if all names have them.

    Returns:
        The old name of each new name, and the prefix that was removed.
    """
    new = {name: name for name in names}
    prefix = ""
    while new:
        for wrapper in _WRAPPED:
            if all(name.startswith(wrapper) and name != wrapper for name in new):
                new = {name.removeprefix(wrapper): old for name, old in new.items()}
                prefix += wrapper
                break
        else:
            break
    return new, prefix


def children(tree: Any) -> list[tuple[str, Any]]:
    """The parts of a mapping or a list, with their names. A part of a list is named by its position."""
    if isinstance(tree, Mapping):
        return [(str(name), child) for name, child in tree.items()]
    if isinstance(tree, list | tuple):
        return [(str(i), child) for i, child in enumerate(tree)]
    return []


def named(part: Any, is_tensor: IsTensor) -> set[Named]:
    """Names and shapes of the tensors of a part, without prefixes that all names share."""
    shapes = {".".join(path): shape_of(leaf) for path, leaf in flattened(part, is_tensor)}
    large = {name: shape for name, shape in shapes.items() if shape} or shapes  # without counters
    return {(new, large[old]) for new, old in without_shared_prefixes(large)[0].items()}


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor or of its description; ``()`` for anything else."""
    return tuple(getattr(tensor, "shape", ()))


def mostly(own: set[Named], others: set[Named]) -> bool:
    """Whether at least 90 percent of the names and shapes are among the others."""
    return 10 * len(own & others) >= 9 * len(own)
