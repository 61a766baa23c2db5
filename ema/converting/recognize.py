"""Where in a checkpoint the average lies, told by the names of its parts; raw weights are none.

A checkpoint is a tree of mappings and lists whose leaves are tensors, or descriptions of tensors that
nobody has read yet, and other values. Frameworks differ in the tensors only, so one set of rules
serves them all:

- A part whose name says so is an average: ``ema``, ``params_ema``, ``model_ema``, ``state_dict_ema``,
  ``g_ema``, ``swa_model``, … A ``teacher`` or a ``target`` is one where another part, such as the
  ``student``, has tensors of the same names: another teacher may be any trained model.
- In a flat state dict the first word of each name says so: ``model_ema.…``, ``teacher.…``.
- Of several, ``key`` chooses. Where there is none, nothing is taken without the user's word for it.
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
_TWINS = {"teacher", "target", "average", "avg", "momentum"}
"""An average where something else has the same names, and anything otherwise."""

_OPTIMIZERS = {"opt", "optim", "optimizer", "optimizers", "scheduler", "scaler"}
"""What is in these are moments of gradients, and averages of them."""

_WRAPPERS = ("module", "state_dict", "model", "model_state_dict", "ema", "ema_model", "average")
_WRAPPED = ("module.", "_orig_mod.")
_WEIGHTS = {"params", "model", "module", "state_dict", "model_state_dict", "weights", "variables"}
_MOST_PARTS = 10_000
_DEEPEST = 8


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
        CheckpointError: there is none, or there are several, or ``key`` is not there; with what there
            is.
    """
    if key is not None:
        return _by_key(tree, is_tensor, key)
    found = _candidates(tree, is_tensor)
    if len(found) > 1:
        names = listing(candidate.label for candidate in found)
        raise CheckpointError(
            f"it holds several averages, {names}: key= (--key) names the one that is meant"
        )
    if found:
        return found[0].chosen
    if averaged:
        return _at_users_word(tree, is_tensor)
    raise CheckpointError(
        f"nothing in it says that it holds averages: it holds {contents(tree, is_tensor)}; key="
        " (--key) names the part that is the average, and averaged=True (--averaged) says that the"
        " weights are averages"
    )


def subtree(tree: Any, path: Path) -> Any:
    """What lies at the end of a path."""
    for step in path:
        tree = tree[int(step)] if isinstance(tree, list | tuple) else tree[step]
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Candidate:
    label: str  # what key= takes
    chosen: Chosen


def _candidates(tree: Mapping[str, Any], is_tensor: IsTensor) -> list[_Candidate]:
    found: list[_Candidate] = []
    _collect(tree, is_tensor, (), found)
    return found


def _collect(tree: Any, is_tensor: IsTensor, path: Path, found: list[_Candidate]) -> None:
    """Averages among the parts of ``tree``, else among the parts of those."""
    children = _children(tree)[:_MOST_PARTS]
    parts = {
        name: child
        for name, child in children
        if not is_tensor(child) and next(flattened(child, is_tensor), None) is not None
    }
    others = {name for name in parts if not _words(name) & _OPTIMIZERS}
    in_weights = any(name in _WEIGHTS for name in path)  # a layer may be called ema, too
    before = len(found)
    for name in sorted(others):
        words = _words(name)
        if (words & _SURE and not in_weights) or (
            words & (_SURE | _TWINS) and _has_twin(parts, name, others, is_tensor)
        ):
            found.append(_candidate(tree, name, path, is_tensor))
    if isinstance(tree, Mapping):
        found += _prefixed(tree, [name for name, child in children if is_tensor(child)], path)
    if len(found) == before and len(path) < _DEEPEST:
        for name in sorted(others):
            _collect(parts[name], is_tensor, (*path, name), found)


def _candidate(tree: Any, name: str, path: Path, is_tensor: IsTensor) -> _Candidate:
    inside = _inside(subtree(tree, (name,)), is_tensor)
    path = (*path, name, *inside)
    label = ".".join(path)
    around = tree if isinstance(tree, Mapping) else {}
    return _Candidate(
        label=label,
        chosen=Chosen(
            path=path, kind=f"`{label}`", beside=_beside(around, name, inside, is_tensor)
        ),
    )


def _inside(tree: Any, is_tensor: IsTensor) -> Path:
    """Where the tensors of a part are, if it wraps one mapping and counters: ``{"module": …}``."""
    if isinstance(tree, Mapping) and not any(is_tensor(child) for child in tree.values()):
        parts = [
            str(name)
            for name, child in tree.items()
            if next(flattened(child, is_tensor), None) is not None
        ]
        if len(parts) == 1 and (parts[0] in _WRAPPERS or _words(parts[0]) & _SURE):
            return (parts[0], *_inside(tree[parts[0]], is_tensor))
    return ()


def _beside(
    around: Mapping[str, Any], name: str, inside: Path, is_tensor: IsTensor
) -> dict[str, Any]:
    """Counters of the average: those in what wraps it, before those beside it."""
    values: dict[str, Any] = {}
    levels = [around]
    for step in (name, *inside):
        levels.append(levels[-1][step])
    for level in levels[:-1] if inside else levels[:1]:
        values |= {
            str(key): value
            for key, value in level.items()
            if isinstance(value, int | float) or is_tensor(value)
        }
    return values


def _has_twin(
    parts: Mapping[str, Any], name: str, others: Iterable[str], is_tensor: IsTensor
) -> bool:
    """Whether another part that is no average has nearly all names and shapes of this one."""

    def names(part: str) -> set[tuple[str, Any]]:
        inside = subtree(parts[part], _inside(parts[part], is_tensor))
        shapes = {".".join(path): _shape(leaf) for path, leaf in flattened(inside, is_tensor)}
        return {(new, shapes[old]) for new, old in without_shared_prefixes(shapes)[0].items()}

    own = names(name)
    return any(
        _mostly(own, names(other))
        for other in others
        if other != name and not _words(other) & (_SURE | _TWINS)
    )


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(getattr(tensor, "shape", ()))


def _mostly(own: set[_Named], others: set[_Named]) -> bool:
    return 10 * len(own & others) >= 9 * len(own)


# --- by the first word of the names of a flat state dict ------------------------------------------


def _prefixed(tree: Any, names: Sequence[str], path: Path) -> list[_Candidate]:
    """``model_ema.…`` beside ``model.…``, ``teacher.…`` beside ``student.…``."""
    plain, shared = without_shared_prefixes(names)
    groups: dict[str, dict[str, str]] = {}
    for name, old in plain.items():
        first, separator, rest = name.partition("." if "." in name else "/")
        if separator and rest:
            groups.setdefault(first, {})[rest] = old
    averages = {prefix for prefix in groups if _words(prefix) & (_SURE | _TWINS)}
    shapes = {old: _shape(tree[old]) for old in names}
    raw = [
        {(rest, shapes[old]) for rest, old in group.items()}
        for prefix, group in groups.items()
        if prefix not in averages
    ]
    raw.append(
        {(new, shapes[old]) for new, old in plain.items() if new.partition(".")[0] not in averages}
    )
    found = []
    for prefix in sorted(averages):
        words, own = _words(prefix), groups[prefix]
        label = ".".join((*path, shared + prefix))
        has_twin = any(_mostly({(rest, shapes[old]) for rest, old in own.items()}, r) for r in raw)
        if has_twin and (words & _SURE or 2 * len(own) >= len(raw[-1])):
            chosen = {new: own[rest] for new, rest in without_shared_prefixes(own)[0].items()}
        elif dotless := _with_dots(own, plain, words, groups):
            chosen = dotless
        elif words & _SURE and not raw[-1]:
            chosen = {new: own[rest] for new, rest in without_shared_prefixes(own)[0].items()}
        else:
            continue
        beside = {rest: tree[old] for rest, old in own.items() if old not in chosen.values()}
        found.append(
            _Candidate(
                label=label,
                chosen=Chosen(
                    path=path, kind=f"`{label}.…` of a state dict", names=chosen, beside=beside
                ),
            )
        )
    return found


def _with_dots(
    own: Mapping[str, str],
    plain: Mapping[str, str],
    words: set[str],
    groups: Mapping[str, Mapping[str, str]],
) -> dict[str, str]:
    """Names of latent diffusion's ``LitEma``, which have lost their dots, by those of the raw weights.

    ``model_ema.diffusion_modelinweight`` is the average of ``model.diffusion_model.in.weight``.
    """
    if not words & _SURE:
        return {}
    best: dict[str, str] = {}
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
            old_to_new = {old: new for new, old in plain.items()}
            best = {old_to_new[names[0]]: own[rest] for rest, names in found.items()}
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
            f"key= (--key) names {key!r:.80}, which holds no tensors: it holds"
            f" {contents(tree, is_tensor)}"
        )
    inside = _inside(part, is_tensor)
    around = subtree(tree, path[:-1])
    return Chosen(
        path=(*path, *inside),
        kind=f"`{key}`",
        beside=_beside(around, path[-1], inside, is_tensor) if isinstance(around, Mapping) else {},
    )


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
        flat = {name for name, child in children.items() if is_tensor(child)}
        candidates = [each for each in _prefixed(tree, sorted(flat), ()) if each.label == key]
        if candidates:  # its counters are told from its tensors, and lost dots put back
            return dataclasses.replace(candidates[0].chosen, path=path)
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
        if len(parts) != 1 or (path and parts[0] not in _WRAPPERS):
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
