"""Find the average in a checkpoint by the names of its parts, and never take raw weights for it.

A checkpoint is a tree of mappings and lists. Its leaves are tensors, or descriptions of tensors that are
still in the file, and other values. Frameworks differ only in their tensors, so that one set of rules
serves all of them. The rules take a part for an average if two things hold:

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
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ema.errors import CheckpointError, listing, shortened

__all__ = ["Chosen", "choose", "contents", "flattened", "subtree", "without_shared_prefixes"]

Path = tuple[str, ...]
IsTensor = Callable[[Any], bool]
_Named = tuple[str, tuple[int, ...]]

_SURE = {"ema", "swa", "polyak", "averaged", "shadow"}
_MAYBE = {"teacher", "target", "average", "avg", "momentum"}
"""An average, a hard copy of raw weights, or another model."""

_OF_ALL = {
    *("model", "models", "net", "network", "module", "weights", "weight", "variables"),
    *("state", "dict", "params", "param", "parameters"),
}
"""Words that say nothing of what an average is of."""

_LIVE = {"student", "online", "live", "raw", "current"}
"""Words of weights that an average may be of, beside those that say nothing."""

_NO_WEIGHTS = {
    *(
        "grad",
        "grads",
        "gradient",
        "gradients",
        "sq",
        "square",
        "fisher",
        "hessian",
        "moment",
        "moments",
    ),
    *(
        "metric",
        "metrics",
        "loss",
        "losses",
        "stats",
        "statistics",
        "buffer",
        "norm",
        "var",
        "variance",
    ),
}
_OPTIMIZERS = {"opt", "optim", "optimizer", "optimizers", "scheduler", "scaler"}
"""What is in these are moments of gradients, and averages of them."""

_WEIGHTS = {"params", "model", "module", "state_dict", "model_state_dict", "weights", "variables"}
"""A part inside one of these is a layer, whatever it is called."""

_WRAPPERS = {"module", "model", "net", "state", "dict", "average"}
_WRAPPED = ("module.", "_orig_mod.")
_MOST_PARTS = 10_000
_DEEPEST = 8
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

    path: Path
    kind: str
    names: Mapping[str, str] | None = None
    beside: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at_users_word: bool = False
    notes: tuple[str, ...] = ()


def choose(
    tree: Mapping[str, Any], is_tensor: IsTensor, *, key: str | None = None, averaged: bool = False
) -> Chosen:
    """Find the average of a checkpoint.

    Args:
        tree: the checkpoint.
        is_tensor: tells its tensors.
        key: names the part that is the average: keys with dots between them, or what the names of
            a flat state dict begin with.
        averaged: the weights are averages, whatever they are called.

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
            f"it holds several averages, {names}: key= (--key) names the one that is meant"
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
        f"nothing in it says that it holds averages{proposed}: it holds {contents(tree, is_tensor)};"
        " key= (--key) names the part that is the average, and averaged=True (--averaged) says that"
        " the weights are averages"
    )


def subtree(tree: Any, path: Path) -> Any:
    """What lies at the end of a path."""
    for step in path:
        tree = dict(_children(tree))[step]
    return tree


def contents(tree: Any, is_tensor: IsTensor) -> str:
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


def flattened(tree: Any, is_tensor: IsTensor, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The tensors of a tree with their paths."""
    if is_tensor(tree):
        yield path, tree
        return
    if len(path) > _TOO_DEEP:
        raise CheckpointError(f"it is nested deeper than {_TOO_DEEP} levels, or holds itself")
    for name, child in _children(tree):
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


def _children(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        return [(str(name), child) for name, child in tree.items()]
    if isinstance(tree, list | tuple):
        return [(str(i), child) for i, child in enumerate(tree)]
    return []


def _words(name: str) -> set[str]:
    """``G_ema``, ``modelEMA`` and ``ema-params`` say ``ema``; ``schema`` does not."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


# --- by the names of the parts --------------------------------------------------------------------


class _Search:
    """What the names of a tree say.

    Attributes:
        candidates: averages, each with what ``key`` takes.
        proposed: what may be one.
    """

    def __init__(self, tree: Any, is_tensor: IsTensor) -> None:
        self._tree, self._is_tensor = tree, is_tensor
        self._weights = list(_weights(tree, is_tensor))
        self.candidates: list[tuple[str, Chosen]] = []
        self.proposed: list[str] = []
        self._look(tree, ())

    def _look(self, tree: Any, path: Path) -> None:
        """Averages among the parts of ``tree``, else among the parts of those."""
        before = len(self.candidates)
        parts = {
            name: part
            for name, part in _parts(tree, self._is_tensor).items()
            if not _words(name) & _NO_WEIGHTS
        }
        for name in sorted(parts):
            words = _words(name)
            if not words & (_SURE | _MAYBE):
                continue
            label = ".".join((*path, name))
            inside = self._inside(parts[name], name) if words & _SURE else None
            if inside is None or any(step in _WEIGHTS for step in path):
                self.proposed.append(label)
                continue
            whole = (*path, name, *inside)
            beside = _beside(tree, name, inside, self._is_tensor)
            label = ".".join(whole)
            self.candidates.append((label, Chosen(path=whole, kind=f"`{label}`", beside=beside)))
        if isinstance(tree, Mapping):
            for label, chosen in _prefixed(tree, self._is_tensor, path, self.proposed):
                self.candidates.append((label, chosen))
        if len(self.candidates) == before and len(path) < _DEEPEST:
            for name in sorted(parts):
                self._look(parts[name], (*path, name))

    def _inside(self, part: Any, name: str) -> Path | None:
        """The way from a part to its tensors; None if it is not seen to be an average of weights."""
        words = _words(name)
        others = [each for label, each in self._weights if _may_be_of(words, _words(label))]
        if others:
            return _matching(part, others, self._is_tensor)
        if self._weights or words - _SURE - _OF_ALL:
            return None
        return _only(part, self._is_tensor)


def _may_be_of(average: set[str], weights: set[str]) -> bool:
    """Whether a name may be that of the average of the other: ``g_ema`` of ``g`` and of ``model``."""
    of, called = average - _SURE - _OF_ALL, weights - _OF_ALL
    return average <= _SURE or called == of or called <= _LIVE


def _weights(tree: Any, is_tensor: IsTensor, path: Path = ()) -> Iterator[tuple[str, set[_Named]]]:
    """The name and the tensors of every part that has weights and is not called an average."""
    for name, part in _parts(tree, is_tensor).items():
        if not _words(name) & (_SURE | _MAYBE):
            yield name, _named(part, is_tensor)
            if len(path) < _DEEPEST and not any(is_tensor(child) for _, child in _children(part)):
                yield from _weights(part, is_tensor, (*path, name))


def _parts(tree: Any, is_tensor: IsTensor) -> dict[str, Any]:
    """The parts that hold tensors, without those of optimizers."""
    return {
        name: child
        for name, child in _children(tree)[:_MOST_PARTS]
        if not is_tensor(child)
        and not _words(name) & _OPTIMIZERS
        and next(flattened(child, is_tensor), None) is not None
    }


def _matching(part: Any, others: Sequence[set[_Named]], is_tensor: IsTensor) -> Path | None:
    """The way to what has the names and shapes of one of the others: the part, or one in it."""
    if (wrapped := _wrapped(part, is_tensor)) is not None:  # with its counters beside it
        way = _matching(dict(_children(part))[wrapped], others, is_tensor)
        if way is not None:
            return (wrapped, *way)
    if any(_mostly(_named(part, is_tensor), other) for other in others):
        return ()
    ways = {
        name: way
        for name, child in _parts(part, is_tensor).items()
        if (way := _matching(child, others, is_tensor)) is not None
    }
    if len(ways) > 1:  # the live weights may be kept beside the average
        ways = {name: way for name, way in ways.items() if _words(name) & _SURE}
    return (next(iter(ways)), *next(iter(ways.values()))) if len(ways) == 1 else None


def _wrapped(part: Any, is_tensor: IsTensor) -> str | None:
    """The only part with weights, if its name says nothing: ``{"module": …, "updates": 5}``."""
    parts = list(_parts(part, is_tensor))
    direct = any(is_tensor(child) and _shape(child) for _, child in _children(part))
    one = len(parts) == 1 and not direct and bool(_words(parts[0]) & (_SURE | _WRAPPERS))
    return parts[0] if one else None


def _only(part: Any, is_tensor: IsTensor) -> Path | None:
    """The way to the one mapping with tensors."""
    if any(is_tensor(child) for _, child in _children(part)):
        return ()
    parts = _parts(part, is_tensor)
    if len(parts) != 1:
        return () if not any(_words(name) & (_SURE | _MAYBE | _OF_ALL) for name in parts) else None
    wrapped = _wrapped(part, is_tensor)
    inside = None if wrapped is None else _only(parts[wrapped], is_tensor)
    return () if wrapped is None or inside is None else (wrapped, *inside)


def _beside(around: Any, name: str, inside: Path, is_tensor: IsTensor) -> dict[str, Any]:
    """Counters of the average: those beside it, and before those the ones in what wraps it."""
    values: dict[str, Any] = {}
    for step in (name, *inside):
        level = dict(_children(around))
        values |= {
            key: value
            for key, value in level.items()
            if isinstance(value, int | float) or is_tensor(value)
        }
        around = level[step]
    return values


def _named(part: Any, is_tensor: IsTensor) -> set[_Named]:
    """Names and shapes of the tensors of a part, without the prefixes that all names share."""
    shapes = {".".join(path): _shape(leaf) for path, leaf in flattened(part, is_tensor)}
    large = {name: shape for name, shape in shapes.items() if shape} or shapes  # without counters
    return {(new, large[old]) for new, old in without_shared_prefixes(large)[0].items()}


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "shape", ()))


def _mostly(own: set[_Named], others: set[_Named]) -> bool:
    return 10 * len(own & others) >= 9 * len(own)


# --- by the first word of the names of a flat state dict ------------------------------------------


def _prefixed(
    tree: Any, is_tensor: IsTensor, path: Path, proposed: list[str]
) -> Iterator[tuple[str, Chosen]]:
    """``model_ema.…`` beside ``model.…``, ``ema.…`` beside the rest."""
    shapes = {name: _shape(child) for name, child in _children(tree) if is_tensor(child)}
    plain, shared = without_shared_prefixes(shapes)
    groups: dict[str, dict[str, str]] = {}
    for name, old in plain.items():
        first, separator, rest = name.partition("." if "." in name else "/")
        if separator and rest:
            groups.setdefault(first, {})[rest] = old
    called = {prefix for prefix in groups if _words(prefix) & (_SURE | _MAYBE)}
    live = {new: old for new, old in plain.items() if new.partition(".")[0] not in called}
    for prefix in sorted(called):
        words, own = _words(prefix), groups[prefix]
        label = ".".join((*path, shared + prefix))
        others = [
            group
            for name, group in groups.items()
            if name not in called and _may_be_of(words, _words(name))
        ]
        if words <= _SURE:
            others.append(live)
        chosen = None
        if words & _SURE and not words & _NO_WEIGHTS:
            alone = not live and len(called) == 1
            chosen = _names_of(own, others, shapes, plain, groups, alone=alone)
        if chosen is None:
            proposed.append(label)
            continue
        used = set(chosen.values())
        beside = {short: tree[old] for short, old in own.items() if old not in used}
        kind = f"`{label}.…` of a state dict"
        yield label, Chosen(path=path, kind=kind, names=chosen, beside=beside)


def _names_of(
    own: Mapping[str, str],
    others: Sequence[Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    plain: Mapping[str, str],
    groups: Mapping[str, Mapping[str, str]],
    *,
    alone: bool,
) -> dict[str, str] | None:
    """New names of the averages to those in the state dict; None where it is not seen that they are."""
    stripped = without_shared_prefixes(own)[0]
    names = {new: own[short] for new, short in stripped.items()}
    mine = {(new, shapes[old]) for new, old in names.items() if shapes[old]}
    raw = [{(short, shapes[old]) for short, old in group.items()} for group in others]
    if mine and any(_mostly(mine, other) for other in raw):
        return names
    if dotless := _with_dots(own, plain, groups):
        return dotless
    return names if alone and not own.keys() >= {"decay", "num_updates"} else None


def _with_dots(
    own: Mapping[str, str], plain: Mapping[str, str], groups: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Names of latent diffusion's ``LitEma``, which have lost their dots, by those of the raw weights.

    ``model_ema.diffusion_modelinweight`` is the average of ``model.diffusion_model.in.weight``.
    """
    best: dict[str, str] = {}
    new_of = {old: new for new, old in plain.items()}
    for group in groups.values():
        if group is own:
            continue
        by_dotless: dict[str, list[str]] = {}
        for rest, old in group.items():
            by_dotless.setdefault(rest.replace(".", ""), []).append(old)
        found = {rest: by_dotless[rest] for rest in own if rest in by_dotless}
        if twice := [names for names in found.values() if len(names) > 1]:
            raise CheckpointError(
                f"{listing(twice[0])} are one name without dots: which of them the average is of"
                " cannot be told"
            )
        if len(found) > len(best):
            best = {new_of[names[0]]: own[rest] for rest, names in found.items()}
    unmatched = len(own) - len(best)
    return best if best and unmatched <= len(_COUNTERS) else {}


_COUNTERS = ("decay", "num_updates", "initted", "step")


# --- at the user's word ---------------------------------------------------------------------------


def _by_key(tree: Mapping[str, Any], is_tensor: IsTensor, key: str) -> Chosen:
    path = _path_of(tree, key, is_tensor)
    if path is None:
        if (flat := _by_prefix(tree, is_tensor, key)) is not None:
            return flat
        raise CheckpointError(
            f"key= (--key) names {key!r:.80}, which is not there: it holds"
            f" {contents(tree, is_tensor)}"
        )
    part = subtree(tree, path)
    if next(flattened(part, is_tensor), None) is None:
        raise CheckpointError(
            f"key= (--key) names {key!r:.80}, a part without tensors: it holds"
            f" {contents(tree, is_tensor)}"
        )
    inside = _Search(part, is_tensor).candidates
    if len(inside) > 1:
        names = listing(f"{key}.{label}" for label, _ in inside)
        raise CheckpointError(f"`{key}` holds several averages: key= (--key) names one of {names}")
    if inside:  # beside the weights that it is of
        chosen = inside[0][1]
        return dataclasses.replace(chosen, path=(*path, *chosen.path), kind=f"`{key}`")
    way = _only(part, is_tensor) or ()
    around = subtree(tree, path[:-1])
    beside = _beside(around, path[-1], way, is_tensor)
    return Chosen(path=(*path, *way), kind=f"`{key}`", beside=beside)


def _path_of(tree: Any, key: str, is_tensor: IsTensor) -> Path | None:
    """Names may have dots of their own: the longest that is there is tried first."""
    if is_tensor(tree):
        return None
    names = dict(_children(tree))
    words = key.split(".")
    for n in range(len(words), 0, -1):
        name, rest = ".".join(words[:n]), ".".join(words[n:])
        if name in names and not is_tensor(names[name]):
            if not rest:
                return (name,)
            if (below := _path_of(names[name], rest, is_tensor)) is not None:
                return (name, *below)
    return None


def _by_prefix(tree: Any, is_tensor: IsTensor, key: str, path: Path = ()) -> Chosen | None:
    """A part of a flat state dict, at the top or below the first words of ``key``."""
    children = dict(_children(tree))
    own = {
        name[len(key) + 1 :]: name
        for name, child in children.items()
        if is_tensor(child) and name.startswith((f"{key}.", f"{key}/"))
    }
    if own:
        candidates = [each for label, each in _prefixed(tree, is_tensor, (), []) if label == key]
        if candidates:  # its counters are told from its tensors, and lost dots put back
            return dataclasses.replace(candidates[0], path=path)
        names = {new: own[rest] for new, rest in without_shared_prefixes(own)[0].items()}
        label = ".".join((*path, key))
        return Chosen(path=path, kind=f"`{label}.…` of a state dict", names=names)
    for name, child in children.items():
        if key.startswith(f"{name}.") and not is_tensor(child):
            rest = key.removeprefix(f"{name}.")
            if (found := _by_prefix(child, is_tensor, rest, (*path, name))) is not None:
                return found
    return None


def _at_users_word(tree: Mapping[str, Any], is_tensor: IsTensor) -> Chosen:
    """The only part with tensors that belongs to no optimizer, or the tree itself."""
    path: Path = ()
    node: Any = tree
    while not any(is_tensor(child) for _, child in _children(node)):
        parts = [
            name
            for name, child in _children(node)
            if not _words(name) & _OPTIMIZERS
            and next(flattened(child, is_tensor), None) is not None
        ]
        if len(parts) != 1 or (path and not _words(parts[0]) & (_SURE | _OF_ALL)):
            break
        path, node = (*path, parts[0]), subtree(node, (parts[0],))
    if not path:
        parts = [name for name, child in _children(tree) if not is_tensor(child)]
        if any(_words(name) & _OPTIMIZERS for name in parts) or not _is_plain(tree, is_tensor):
            raise CheckpointError(
                f"it holds {contents(tree, is_tensor)}: key= (--key) names the part that is the"
                " average"
            )
    label = ".".join(path)
    around = subtree(tree, path[:-1]) if path else {}
    return Chosen(
        path=path,
        kind=f"`{label}`" if label else "weights",
        beside=_beside(around, path[-1], (), is_tensor) if path else {},
        at_users_word=True,
        notes=(
            f"that {f'`{label}`' if label else 'the weights'} are averages is taken at your word",
        ),
    )


def _is_plain(tree: Any, is_tensor: IsTensor) -> bool:
    """Weights alone: a flat state dict, or a nested one as Flax has it."""
    return next(flattened(tree, is_tensor), None) is not None
