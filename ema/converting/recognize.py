"""Find the average in a checkpoint by the names of its parts, without mistaking raw weights for it.

A checkpoint is a tree of mappings and lists. Its leaves are tensors, descriptions of tensors that are
still in the file, and other values. Frameworks differ only in their tensors, so one set of rules serves
all of them. The rules take a part for an average if two things hold:

- Its name says so: ``ema``, ``params_ema``, ``model_ema``, ``state_dict_ema``, ``g_ema``, ``swa_model``. Other
  words in the name may only tell which weights it averages. ``swa_attn`` may be a layer, and
  ``ema_sq_grad`` holds gradients.
- The tree holds these weights too, under the same names and with the same shapes; or it holds no other
  weights at all.

In a flat state dict the rules look at the first word of each name: ``model_ema.…`` beside ``model.…``. A
``teacher`` or a ``target`` may be an average or another model; the error proposes it. If there are several
averages, ``key`` chooses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ema.converting.flat_names import prefixed
from ema.converting.trees import (
    Chosen,
    IsTensor,
    KeyPath,
    Named,
    children,
    described_parts,
    flattened,
    mostly,
    named,
    shape_of,
    subtree,
    without_shared_prefixes,
)
from ema.converting.words import MAYBE, NO_WEIGHTS, OF_ALL, OPTIMIZERS, SURE, may_be_of, words
from ema.errors import CheckpointError, listing

__all__ = ["choose"]

_WEIGHTS = {"params", "model", "module", "state_dict", "model_state_dict", "weights", "variables"}
"""Names of weights. Any part inside them is a layer, even if its name sounds like an average."""
_WRAPPERS = {"module", "model", "net", "state", "dict", "average"}
_MOST_PARTS = 10_000
_DEEPEST = 8


def choose(
    tree: Mapping[str, Any], is_tensor: IsTensor, *, key: str | None = None, averaged: bool = False
) -> Chosen:
    """Find the average of a checkpoint.

    Args:
        tree: the checkpoint.
        is_tensor: whether a node is a tensor.
        key: the part that is the average: keys with dots between them, or the prefix of its names in a
            flat state dict.
        averaged: the weights are averages, though no name says so.

    Raises:
        CheckpointError: the tree does not hold exactly one average, or lacks ``key``. The message lists
            the parts of the tree.
    """
    if key is not None:
        return _by_key(tree, is_tensor, key)
    found = _Search(tree, is_tensor)
    if len(found.candidates) > 1:
        names = listing(label for label, _ in found.candidates)
        raise CheckpointError(
            f"it holds several averages, {names}: pass key= (--key) to choose one"
        )
    if found.candidates:
        return found.candidates[0][1]
    if averaged:
        return _at_users_word(tree, is_tensor)
    proposed = (
        f" ({listing(found.proposed)} may be one, or another model, or a copy of raw weights)"
        if found.proposed
        else ""
    )
    raise CheckpointError(
        f"nothing in it says that it holds averages{proposed}: it holds {described_parts(tree, is_tensor)};"
        " pass key= (--key) to name the part that is the average, or averaged=True (--averaged) if the"
        " weights are averages"
    )


class _Search:
    """A search of a tree for parts whose names say that they are averages.

    Attributes:
        candidates: the averages found, each with the ``key`` that chooses it.
        proposed: keys of parts that may be averages, but are not certain.
    """

    def __init__(self, tree: Any, is_tensor: IsTensor) -> None:
        self._tree, self._is_tensor = tree, is_tensor
        self._weights = list(_weights(tree, is_tensor))
        self.candidates: list[tuple[str, Chosen]] = []
        self.proposed: list[str] = []
        self._look(tree, ())

    def _look(self, tree: Any, path: KeyPath) -> None:
        """Look for averages among the parts of ``tree``. If there are none, look inside each part."""
        before = len(self.candidates)
        parts = {
            name: part
            for name, part in _parts(tree, self._is_tensor).items()
            if not words(name) & NO_WEIGHTS
        }
        for name in sorted(parts):
            said = words(name)
            if not said & (SURE | MAYBE):
                continue
            label = ".".join((*path, name))
            inside = self._inside(parts[name], name) if said & SURE else None
            if inside is None or any(step in _WEIGHTS for step in path):
                self.proposed.append(label)
                continue
            whole = (*path, name, *inside)
            beside = _beside(tree, name, inside, self._is_tensor)
            label = ".".join(whole)
            self.candidates.append((label, Chosen(path=whole, kind=f"`{label}`", beside=beside)))
        if isinstance(tree, Mapping):
            for label, chosen in prefixed(tree, self._is_tensor, path, self.proposed):
                self.candidates.append((label, chosen))
        if len(self.candidates) == before and len(path) < _DEEPEST:
            for name in sorted(parts):
                self._look(parts[name], (*path, name))

    def _inside(self, part: Any, name: str) -> KeyPath | None:
        """The path from a part to its tensors; None if nothing shows that it averages weights."""
        said = words(name)
        others = [each for label, each in self._weights if may_be_of(said, words(label))]
        if others:
            return _matching(part, others, self._is_tensor)
        if self._weights or said - SURE - OF_ALL:
            return None
        return _only(part, self._is_tensor)


def _weights(
    tree: Any, is_tensor: IsTensor, path: KeyPath = ()
) -> Iterator[tuple[str, set[Named]]]:
    """Yield name and tensors of each part that holds weights and is not called an average."""
    for name, part in _parts(tree, is_tensor).items():
        if not words(name) & (SURE | MAYBE):
            yield name, named(part, is_tensor)
            if len(path) < _DEEPEST and not any(is_tensor(child) for _, child in children(part)):
                yield from _weights(part, is_tensor, (*path, name))


def _parts(tree: Any, is_tensor: IsTensor) -> dict[str, Any]:
    """The parts that hold tensors, except those of optimizers."""
    return {
        name: child
        for name, child in children(tree)[:_MOST_PARTS]
        if not is_tensor(child)
        and not words(name) & OPTIMIZERS
        and next(flattened(child, is_tensor), None) is not None
    }


def _matching(part: Any, others: Sequence[set[Named]], is_tensor: IsTensor) -> KeyPath | None:
    """The path to the tensors whose names and shapes match one of the others, in this part or below."""
    if (wrapped := _wrapped(part, is_tensor)) is not None:  # then counters may lie beside it
        way = _matching(dict(children(part))[wrapped], others, is_tensor)
        if way is not None:
            return (wrapped, *way)
    if any(mostly(named(part, is_tensor), other) for other in others):
        return ()
    ways = {
        name: way
        for name, child in _parts(part, is_tensor).items()
        if (way := _matching(child, others, is_tensor)) is not None
    }
    if len(ways) > 1:  # the part may also hold the live weights
        ways = {name: way for name, way in ways.items() if words(name) & SURE}
    return (next(iter(ways)), *next(iter(ways.values()))) if len(ways) == 1 else None


def _wrapped(part: Any, is_tensor: IsTensor) -> str | None:
    """The only part with weights, if it is a mere wrapper, as in ``{"module": …, "updates": 5}``."""
    parts = list(_parts(part, is_tensor))
    direct = any(is_tensor(child) and shape_of(child) for _, child in children(part))
    one = len(parts) == 1 and not direct and bool(words(parts[0]) & (SURE | _WRAPPERS))
    return parts[0] if one else None


def _only(part: Any, is_tensor: IsTensor) -> KeyPath | None:
    """The path to the only mapping with tensors; None if a name suggests that one part is an average."""
    if any(is_tensor(child) for _, child in children(part)):
        return ()
    parts = _parts(part, is_tensor)
    if len(parts) != 1:
        return () if not any(words(name) & (SURE | MAYBE | OF_ALL) for name in parts) else None
    wrapped = _wrapped(part, is_tensor)
    inside = None if wrapped is None else _only(parts[wrapped], is_tensor)
    return () if wrapped is None or inside is None else (wrapped, *inside)


def _beside(around: Any, name: str, inside: KeyPath, is_tensor: IsTensor) -> dict[str, Any]:
    """Counters of the average. Those in its wrapper take precedence over those beside it."""
    values: dict[str, Any] = {}
    for step in (name, *inside):
        level = dict(children(around))
        values |= {
            key: value
            for key, value in level.items()
            if isinstance(value, int | float) or is_tensor(value)
        }
        around = level[step]
    return values


def _by_key(tree: Mapping[str, Any], is_tensor: IsTensor, key: str) -> Chosen:
    path = _path_of(tree, key, is_tensor)
    if path is None:
        if (flat := _by_prefix(tree, is_tensor, key)) is not None:
            return flat
        raise CheckpointError(
            f"key= (--key) must name one of its parts, got {key!r:.80}: it holds"
            f" {described_parts(tree, is_tensor)}"
        )
    part = subtree(tree, path)
    if next(flattened(part, is_tensor), None) is None:
        raise CheckpointError(
            f"key= (--key) must name a part with tensors, got {key!r:.80}: it holds"
            f" {described_parts(tree, is_tensor)}"
        )
    inside = _Search(part, is_tensor).candidates
    if len(inside) > 1:
        names = listing(f"{key}.{label}" for label, _ in inside)
        raise CheckpointError(
            f"`{key}` holds several averages: pass key= (--key) to choose one of {names}"
        )
    if inside:  # an average beside its weights
        chosen = inside[0][1]
        return dataclasses.replace(chosen, path=(*path, *chosen.path), kind=f"`{key}`")
    way = _only(part, is_tensor) or ()
    around = subtree(tree, path[:-1])
    beside = _beside(around, path[-1], way, is_tensor)
    return Chosen(path=(*path, *way), kind=f"`{key}`", beside=beside)


def _path_of(tree: Any, key: str, is_tensor: IsTensor) -> KeyPath | None:
    """The path that ``key`` means. Names may contain dots, so it tries the longest name first."""
    if is_tensor(tree):
        return None
    names = dict(children(tree))
    steps = key.split(".")
    for n in range(len(steps), 0, -1):
        name, rest = ".".join(steps[:n]), ".".join(steps[n:])
        if name in names and not is_tensor(names[name]):
            if not rest:
                return (name,)
            if (below := _path_of(names[name], rest, is_tensor)) is not None:
                return (name, *below)
    return None


def _by_prefix(tree: Any, is_tensor: IsTensor, key: str, path: KeyPath = ()) -> Chosen | None:
    """The tensors in a flat state dict whose names begin with ``key``, at the top or in a part."""
    below = dict(children(tree))
    own = {
        name[len(key) + 1 :]: name
        for name, child in below.items()
        if is_tensor(child) and name.startswith((f"{key}.", f"{key}/"))
    }
    if own:
        candidates = [each for label, each in prefixed(tree, is_tensor, (), []) if label == key]
        if candidates:  # this also separates counters from tensors, and restores lost dots
            return dataclasses.replace(candidates[0], path=path)
        names = {new: own[rest] for new, rest in without_shared_prefixes(own)[0].items()}
        label = ".".join((*path, key))
        return Chosen(path=path, kind=f"`{label}.…` of a state dict", names=names)
    for name, child in below.items():
        if key.startswith(f"{name}.") and not is_tensor(child):
            rest = key.removeprefix(f"{name}.")
            if (found := _by_prefix(child, is_tensor, rest, (*path, name))) is not None:
                return found
    return None


def _at_users_word(tree: Mapping[str, Any], is_tensor: IsTensor) -> Chosen:
    """Choose the only part with tensors besides optimizers, or else the tree itself."""
    if path := _only_part(tree, is_tensor):
        label = f"`{'.'.join(path)}`"
        beside = _beside(subtree(tree, path[:-1]), path[-1], (), is_tensor)
        kind, what = label, label
    else:
        parts = [name for name, child in children(tree) if not is_tensor(child)]
        if any(words(name) & OPTIMIZERS for name in parts) or not _is_plain(tree, is_tensor):
            raise CheckpointError(
                f"it holds {described_parts(tree, is_tensor)}: pass key= (--key) to name the part"
                " that is the average"
            )
        beside, kind, what = {}, "weights", "the weights"
    return Chosen(
        path=path,
        kind=kind,
        beside=beside,
        at_users_word=True,
        notes=(f"nothing in the source says that {what} are averages; only you do",),
    )


def _only_part(tree: Mapping[str, Any], is_tensor: IsTensor) -> KeyPath:
    """The path to the only part with tensors besides optimizers; empty if there are several."""
    path: KeyPath = ()
    node: Any = tree
    while not any(is_tensor(child) for _, child in children(node)):
        parts = [
            name
            for name, child in children(node)
            if not words(name) & OPTIMIZERS and next(flattened(child, is_tensor), None) is not None
        ]
        if len(parts) != 1 or (path and not words(parts[0]) & (SURE | OF_ALL)):
            break
        path, node = (*path, parts[0]), subtree(node, (parts[0],))
    return path


def _is_plain(tree: Any, is_tensor: IsTensor) -> bool:
    """Whether the tree holds tensors, flat as in a state dict or nested as in Flax."""
    return next(flattened(tree, is_tensor), None) is not None
