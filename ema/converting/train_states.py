"""Find averages in saved trees of JAX: train states, states of ``params_ema``, and ``EMA`` for nnx.

Orbax and Flax save such trees as nested mappings and lists of arrays. Class names are lost, and keys may
have become strings. An nnx Variable or a boxed linen param adds one level, ``{"value": array}``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ema.checkpoint import Source
from ema.converting.found import Found
from ema.converting.leaves import Leaf, Unread, is_leaf, is_stored_array
from ema.converting.recognize import choose
from ema.converting.trees import Chosen, KeyPath, subtree
from ema.errors import ArgumentError, CheckpointError, listing, shortened

__all__ = ["found_in"]


_STATE = {"step", "count", "params_ema"}
_STATISTICS = ("batch_stats_ema",)
_OF_OUR_EMA = {"params", "step", "count"}
_ONLY_IN_OUR_EMA = {"finer", "remainder", "skipped"}
_OF_OPTAX_EMA = {"count", "ema"}
"""An average of gradients, not of weights: ``optax.EmaState``."""


def found_in(tree: Any, source: str, *, name: str | None, key: str | None, averaged: bool) -> Found:
    """Find the average that a tree holds.

    Args:
        tree: mappings and lists with a ``Leaf`` for each array, and None for each hole.
        source: the format of the file, for messages.
        name: the average of ``params_ema`` to take, if there are several.
        key: the part that is the average.
        averaged: the weights are averages, though nothing in the tree says so.

    Raises:
        ArgumentError: there are several averages of ``params_ema``, and ``name`` does not choose one of
            them.
        CheckpointError: the tree does not hold exactly one average.
    """
    tree = _unboxed(tree)
    if is_leaf(tree):
        raise CheckpointError("it holds one array without a name: save it in a dict")
    tree = dict(_children(tree)) if isinstance(tree, list) else tree
    if key is not None:
        chosen = choose(tree, is_stored_array, key=key)
        if chosen.names is None and (found := _ours(tree, chosen.path, source, name)) is not None:
            return found
        return _from_part(tree, chosen, source)
    if (found := _ours(tree, (), source, name, averaged=averaged)) is not None:
        return found
    several = [found for node in _nodes(tree) if (found := _our_ema(node, source, averaged=False))]
    if len(several) == 1:
        return several[0]
    chosen = choose(_pruned(tree), is_stored_array, averaged=averaged)
    whole = chosen.path[:-1] if chosen.path[-1:] == ("params",) else chosen.path
    if (found := _our_ema(subtree(tree, whole), source, averaged=True)) is not None:
        return dataclasses.replace(found, notes=chosen.notes)
    return _from_part(tree, chosen, source)


def _ours(
    tree: Any, path: KeyPath, source: str, name: str | None, *, averaged: bool = True
) -> Found | None:
    """The average of this library in a part of a tree, from ``params_ema`` or an ``EMA``; else None."""
    part = subtree(tree, path)
    if states := list(_states(part, path)):
        if not path:
            _refuse_others(tree, states)
        return _from_states(states, f"params_ema in {source}", name)
    return _our_ema(part, source, averaged=averaged)


def _nodes(node: Any) -> Iterator[Any]:
    """Yield every node of the tree, from the top."""
    yield node
    for _, child in _children(node):
        yield from _nodes(child)


def _unboxed(node: Any) -> Any:
    """Remove the levels that nnx Variables and linen's boxes add."""
    if isinstance(node, Mapping):
        if node.keys() == {"value"} and (is_leaf(node["value"]) or node["value"] is None):
            return node["value"]
        return {str(key): _unboxed(child) for key, child in node.items()}
    if isinstance(node, list | tuple):
        return [_unboxed(child) for child in node]
    return node


def _pruned(node: Any) -> Any:
    """Remove optax's averages of gradients, and the states of ``params_ema``."""
    if isinstance(node, Mapping):
        if node.keys() == _OF_OPTAX_EMA or _is_state(node):
            return {}
        return {key: _pruned(child) for key, child in node.items()}
    if isinstance(node, list):
        return [_pruned(child) for child in node]
    return node


def _from_part(tree: Any, chosen: Chosen, source: str) -> Found:
    part = subtree(tree, chosen.path)
    if chosen.names is not None:
        part = {new: part[old] for new, old in chosen.names.items()}
    elif isinstance(part, Mapping) and part.keys() == {"params"} and not is_leaf(part["params"]):
        # these are the variables of a linen module, or an nnx.EMA
        part = part["params"]
    tensors, others = _tensors(part)
    step = chosen.beside.get("step")
    return Found(
        kind=f"{chosen.kind} in {source}",
        tensors=tensors,
        told={
            "step": None if step is None else _count("step", step),
            "not_averaged": tuple(others),
        },
        notes=chosen.notes,
    )


# --- states of params_ema -------------------------------------------------------------------------


def _is_state(node: Any) -> bool:
    return isinstance(node, Mapping) and node.keys() >= _STATE


def _states(node: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """Yield every part that has the fields of a ``ParamsEMAState``, with its path."""
    if _is_state(node):
        yield path, node
        return
    for key, child in _children(node):
        yield from _states(child, (*path, key))


def _refuse_others(tree: Any, states: list[tuple[KeyPath, Mapping[str, Any]]]) -> None:
    """Refuse a tree that holds another average beside those of ``params_ema``."""
    try:
        other = choose(_pruned(tree), is_stored_array)
    except CheckpointError:
        return
    labels = listing([other.kind.strip("`"), *(".".join(path) for path, _ in states)])
    raise CheckpointError(f"it holds several averages, {labels}: pass key= (--key) to choose one")


def _from_states(
    states: list[tuple[KeyPath, Mapping[str, Any]]], kind: str, name: str | None
) -> Found:
    averages = [
        (label, path, state) for path, state in states for label in _labels(path, state, name)
    ]
    chosen = [average for average in averages if name is None or average[0] == name]
    if len({label for label, _, _ in chosen}) != 1:
        labels = ", ".join(sorted({str(label) for label, _, _ in averages}))
        raise ArgumentError(f"`name` must choose one of the averages {labels}")
    label = chosen[0][0]
    groups = [_Group(path, state, label) for _, path, state in chosen]
    models = _models(groups)
    if len(models) > 1:
        places = listing(".".join(_shared([group.path for group in model])) for model in models)
        raise CheckpointError(
            f"it holds averages of several models or steps, {places}: pass key= (--key) to choose one"
        )
    tensors, remainders, others = _together(groups)
    step, count, skipped = groups[0].counters
    return Found(
        kind=kind,
        tensors=tensors,
        name=label,
        told={
            "step": step,
            "count": count,
            "skipped": skipped,
            "not_averaged": others,
        },
        remainders=remainders,
    )


def _together(
    groups: Iterable[_Group],
) -> tuple[dict[str, Source], dict[str, Source], tuple[str, ...]]:
    """The averages and remainders of all groups, and the names of leaves that no group averages.

    Raises:
        CheckpointError: two groups have averages of the same name.
    """
    tensors: dict[str, Source] = {}
    remainders: dict[str, Source] = {}
    others: list[str] = []
    for group in groups:
        sources, holes = _tensors(group.average)
        if twice := sources.keys() & tensors.keys():
            raise CheckpointError(f"it holds two averages of `{shortened(min(twice))}`")
        tensors |= sources
        remainders |= _tensors(group.field("remainder"))[0]
        others += holes
    return tensors, remainders, tuple(n for n in dict.fromkeys(others) if n not in tensors)


def _labels(path: KeyPath, state: Mapping[str, Any], name: str | None) -> list[str | None]:
    if "name" in state:
        return (
            list(state["name"]) if isinstance(state["name"], Mapping) and state["name"] else [None]
        )
    # an nnx.State drops everything without arrays, such as the names
    average = state["params_ema"]
    if not isinstance(average, Mapping) or len(average) < 2:
        return [None]
    if name in average:
        return list(average)
    contents = [
        [(p, leaf.shape) for p, leaf in _leaves(child) if is_leaf(leaf)]
        for child in average.values()
    ]
    if contents[0] and all(each == contents[0] for each in contents):
        where = ".".join((*path, "params_ema"))
        raise ArgumentError(
            f"`name` must choose one of {listing(average)}, if these are several averages of one model;"
            f" if they are parts of one average, pass key={where!r} (--key)"
        )
    return [None]


class _Group:
    """The part of an average that lies in one state. Parts with complementary holes make one average."""

    def __init__(self, path: KeyPath, state: Mapping[str, Any], label: str | None) -> None:
        self.path = path
        self._state = state
        self._label = label
        self._several = len(state.get("name") or ()) > 1 or (
            label is not None and "name" not in state
        )
        self.average = self.field("params_ema")
        skipped = state.get("skipped")
        self.counters = (
            _count("step", state["step"]),
            _count("count", state["count"]),
            # without the option the field has no leaves, though its form depends on the format
            None if not is_leaf(skipped) else _count("skipped", skipped),
        )

    def field(self, name: str) -> Any:
        """One tree of the state, such as ``remainder``."""
        tree = self._state.get(name)
        return tree[self._label] if tree and self._several else tree

    def completes(self, other: _Group) -> bool:
        """Whether this part has holes for everything that the other part averages, at the same step.

        Both parts must be links of one chain or groups of one ``optax.partition``. The exception are the
        statistics beside the optimizer in an ``EMATrainState``.
        """
        if self.counters != other.counters:
            return False
        for one, two in ((self.path, other.path), (other.path, self.path)):
            if one[-1:] == _STATISTICS and two[: len(one) - 1] == one[:-1]:
                return True
        shared = len(_shared([self.path, other.path]))
        links = (self.path[shared : shared + 1] + other.path[shared : shared + 1]) or ("",)
        if self.path[:shared][-1:] != ("inner_states",) and not all(map(str.isdigit, links)):
            return False
        holes = {path for path, leaf in _leaves(self.average) if leaf is None}
        return all(
            any(path[:n] in holes for n in range(len(path) + 1))
            for path, leaf in _leaves(other.average)
            if is_leaf(leaf)
        )


def _models(groups: list[_Group]) -> list[list[_Group]]:
    """Sort parts into lists, each of which makes one average."""
    models: list[list[_Group]] = []
    for group in groups:
        for model in models:
            if all(group.completes(other) and other.completes(group) for other in model):
                model.append(group)
                break
        else:
            models.append([group])
    return models


def _shared(paths: list[KeyPath]) -> KeyPath:
    """The longest common prefix of all paths."""
    first = paths[0]
    return first[
        : sum(1 for n in range(1, len(first) + 1) if all(p[:n] == first[:n] for p in paths))
    ]


# --- the state of EMA for nnx ---------------------------------------------------------------------


def _our_ema(tree: Any, source: str, *, averaged: bool) -> Found | None:
    """The average in ``nnx.state(ema)`` of this library's ``EMA``, or in its pure dict; else None.

    Without arrays in ``finer``, ``remainder`` or ``skipped``, the state holds only params and two counters.
    Other programs have such states too, so then ``averaged`` must say that it is an average.
    """
    if not isinstance(tree, Mapping) or not (
        _OF_OUR_EMA <= tree.keys() <= _OF_OUR_EMA | _ONLY_IN_OUR_EMA
    ):
        return None
    own = [leaf for field in _ONLY_IN_OUR_EMA for _, leaf in _leaves(tree.get(field))]
    if not averaged and not any(map(is_leaf, own)):
        return None
    tensors, others = _tensors(tree["params"])
    finer = _tensors(tree.get("finer"))[0]  # `params` holds rounded copies of these
    skipped = tree.get("skipped")
    return Found(
        kind=f"EMA in {source}",
        tensors={**tensors, **finer},
        told={
            "step": _count("step", tree["step"]),
            "count": _count("count", tree["count"]),
            "skipped": _count("skipped", skipped) if is_leaf(skipped) else None,
            "not_averaged": tuple(others),
        },
        remainders=_tensors(tree.get("remainder"))[0],
    )


# --- leaves ---------------------------------------------------------------------------------------


def _children(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, list):
        return [(str(i), child) for i, child in enumerate(node)]
    return []


def _leaves(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield everything in a tree that is neither a mapping nor a list, with its path."""
    if isinstance(node, Mapping | list):
        for key, child in _children(node):
            yield from _leaves(child, (*path, key))
    else:
        yield path, node


def _tensors(tree: Any) -> tuple[dict[str, Source], list[str]]:
    """The averages of a tree by name, and the names of its other leaves."""
    found: dict[str, Source] = {}
    others = []
    for path, leaf in _leaves(tree):
        name = ".".join(path)
        if isinstance(leaf, Unread):
            raise CheckpointError(f"`{shortened(name)}` {leaf.reason}")
        if not isinstance(leaf, Leaf) or not leaf.is_average:
            others += [name] if path else []
        elif name in found:
            raise CheckpointError(f"it holds two tensors with the name `{shortened(name)}`")
        else:
            found[name] = leaf.source(name)
    return found, others


def _count(name: str, value: Any) -> int:
    if isinstance(value, Leaf):
        return value.number(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"`{name}` must be a count, got {value!r:.80}")
    return value
