"""Checkpoints as trees: their parts, their tensors, and what these are called."""

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
    """Where the average lies.

    Attributes:
        path: keys from the top to the mapping that holds its tensors; ``()`` is the whole tree.
        kind: of the checkpoint, in a few words.
        names: where the mapping is flat and only some of its tensors are averages: for each new
            name the one in the mapping. None: all of them, under their own.
        beside: the mapping with counters: what is beside the tensors and around them.
        at_users_word: nothing in the tree says that these are averages.
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
    """The parts of a checkpoint in a few words, for messages."""
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
    """The tensors of a tree with their paths."""
    if is_tensor(tree):
        yield path, tree
        return
    if len(path) > _TOO_DEEP:
        raise CheckpointError(f"it is nested deeper than {_TOO_DEEP} levels, or holds itself")
    for name, child in children(tree):
        yield from flattened(child, is_tensor, (*path, name))


def without_shared_prefixes(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """New name to old, without what DDP and ``torch.compile`` put before all of them; and that prefix."""
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
    """The parts of a mapping or a list, with names; a list names them by their positions."""
    if isinstance(tree, Mapping):
        return [(str(name), child) for name, child in tree.items()]
    if isinstance(tree, list | tuple):
        return [(str(i), child) for i, child in enumerate(tree)]
    return []


def named(part: Any, is_tensor: IsTensor) -> set[Named]:
    """Names and shapes of the tensors of a part, without the prefixes that all names share."""
    shapes = {".".join(path): shape_of(leaf) for path, leaf in flattened(part, is_tensor)}
    large = {name: shape for name, shape in shapes.items() if shape} or shapes  # without counters
    return {(new, large[old]) for new, old in without_shared_prefixes(large)[0].items()}


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor, or of its description."""
    return tuple(getattr(tensor, "shape", ()))


def mostly(own: set[Named], others: set[Named]) -> bool:
    """Whether nine of ten names and shapes are among the others."""
    return 10 * len(own & others) >= 9 * len(own)
