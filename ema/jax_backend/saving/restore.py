"""``adapt_opt_state``: use a saved optimizer state with a chain that has other averages.

A chain with one more link has a state of another structure, so an older checkpoint does not fit it.
The state does not hold the schedule: to change the schedule, just restore the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ema.errors import ArgumentError, ModelError, difference
from ema.jax_backend.state import ParamsEMAState
from ema.jax_backend.trees import plain

__all__ = ["adapt_opt_state"]

Key = tuple[str, ...]
Order = tuple[int, ...]
Labels = tuple[str, ...]


def adapt_opt_state(
    opt_state: optax.OptState, tx: optax.GradientTransformation, params: optax.Params
) -> optax.OptState:
    """A state for ``tx`` that takes from ``opt_state`` everything that both have.

    An average that ``opt_state`` lacks starts at ``params``, at step 0; an average that ``tx``
    lacks is dropped. The same holds for the remainder of a compensated average, which starts at 0,
    and for ``skipped``. Momenta, counts and the averages that both have (by name) are the same
    arrays as in ``opt_state``. Leaves are matched by their names and not by positions in chains, so
    that ``adamw(…)`` may have become ``chain(adamw(…), params_ema(…))``.

    Args:
        opt_state: the state of a chain that differs from ``tx`` only in its averages; as it was in
            the run, or as the plain lists and dicts that Orbax restores without a target, from an
            optax state or from ``nnx.state(optimizer)`` (its ``"opt_state"``).
        tx: the chain to continue with.
        params: the live parameters, as for ``tx.init``; for an ``nnx.Optimizer`` these are
            ``nnx.as_pure(nnx.state(model, wrt))``. Pass the result to
            ``nnx.update(optimizer.opt_state, …)`` there.

    Returns:
        A state for ``tx``.

    Raises:
        ArgumentError: averages would be both added and dropped. A renamed average would silently
            lose its history this way. First adapt to a chain without the old averages.
        ModelError: anything else differs; the error lists all differences.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from ema.jax_backend import params_ema
        >>> params = {"w": jnp.ones(2)}
        >>> before = optax.sgd(0.1, momentum=0.9)
        >>> after = optax.chain(before, params_ema(0.999))
        >>> opt_state = adapt_opt_state(before.init(params), after, params)  # insert
        >>> opt_state[-1].params_ema
        {'w': Array([1., 1.], dtype=float32)}
        >>> adapt_opt_state(opt_state, before, params)[0].trace  # remove
        {'w': Array([0., 0.], dtype=float32)}
    """
    fresh, structure = _flatten(tx.init(params))
    old, _ = _flatten(plain(opt_state))
    leaves = _take(
        [(path, leaf) for path, leaf in fresh if not _is_average(leaf)],
        [(path, leaf) for path, leaf in old if not _is_average(leaf)],
    )
    averages = _take_averages(
        [(path, leaf) for path, leaf in fresh if _is_average(leaf)],
        [(path, leaf) for path, leaf in old if _is_average(leaf)],
    )
    taken, kept = iter(leaves), iter(averages)
    result: optax.OptState = structure.unflatten(
        [next(kept) if _is_average(leaf) else next(taken) for _, leaf in fresh]
    )
    return result


def _flatten(tree: Any) -> tuple[list[tuple[Any, Any]], Any]:
    structure: Any
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_average)
    return flat, structure


def _is_average(node: Any) -> bool:
    if isinstance(node, Mapping):  # as Orbax restores it without a target
        return {"step", "count", "params_ema"} <= node.keys() <= set(ParamsEMAState._fields)
    return isinstance(node, ParamsEMAState)


def _take(
    fresh: list[tuple[Any, Any]], old: list[tuple[Any, Any]], *, positions: bool = False
) -> list[Any]:
    """The old leaf for each fresh one."""
    theirs: dict[Key, list[tuple[Order, Any]]] = {}
    for path, leaf in old:
        key, order = _split(path, positions=positions)
        theirs.setdefault(key, []).append((order, leaf))
    ours: dict[Key, list[tuple[Order, int]]] = {}
    for index, (path, _) in enumerate(fresh):
        key, order = _split(path, positions=positions)
        ours.setdefault(key, []).append((order, index))
    result: list[Any] = [None] * len(fresh)
    mismatched = []
    for key in ours.keys() & theirs.keys():
        name, here, there = ".".join(key), sorted(ours[key]), sorted(theirs[key], key=_order)
        if len(here) != len(there):
            mismatched.append(f"`{name}` appears {len(there)} times, in `tx` {len(here)} times")
            continue
        for (_, index), (_, leaf) in zip(here, there, strict=True):
            result[index] = leaf
            expected, found = _describe(fresh[index][1]), _describe(leaf)
            if expected != found:
                mismatched.append(f"`{name}` is {found}, `tx` has {expected}")
    if text := difference(
        sorted(".".join(key) for key in ours if key not in theirs),
        sorted(".".join(key) for key in theirs if key not in ours),
        sorted(mismatched),
    ):
        raise ModelError(f"`opt_state` does not match this chain and these params: {text}")
    return result


def _take_averages(
    fresh: list[tuple[Any, ParamsEMAState]], old: list[tuple[Any, Any]]
) -> list[ParamsEMAState]:
    """The old average for each fresh one; their places distinguish averages of one name."""
    places = sorted(range(len(fresh)), key=lambda index: _split(fresh[index][0]))
    ours = [tuple(fresh[place][1].name) for place in places]
    states = _states(old, ours)
    _check_names(ours, [tuple(state.name) for state in states])
    waiting: dict[Labels, list[ParamsEMAState]] = {}
    for state in states:
        waiting.setdefault(tuple(state.name), []).append(state)
    result = [state for _, state in fresh]
    for place, labels in zip(places, ours, strict=True):
        if labels in waiting:
            result[place] = _adapted(fresh[place][1], waiting[labels].pop(0))
    return result


def _states(old: list[tuple[Any, Any]], ours: list[Labels]) -> list[ParamsEMAState]:
    """The old averages, in the order of their places."""
    nodes = [node for _, node in sorted(old, key=lambda pair: _split(pair[0]))]
    # an nnx.State keeps only nodes with arrays, and so loses the names
    unknown = ours if len(nodes) == len(ours) else [()] * len(nodes)
    return [
        node if isinstance(node, ParamsEMAState) else _state(node, labels)
        for node, labels in zip(nodes, unknown, strict=True)
    ]


def _check_names(ours: list[Labels], theirs: list[Labels]) -> None:
    """Make sure that averages were only added or only removed.

    Raises:
        ArgumentError: some were added and others removed.
    """
    gone = [labels for labels in theirs if labels not in ours]
    come = [labels for labels in ours if labels not in theirs]
    uneven = [x for x in ours if x in theirs and ours.count(x) != theirs.count(x)]
    if (gone and come) or uneven:
        raise ArgumentError(
            f"`opt_state` must hold the averages of `tx` ({_names(ours)}), or differ only by"
            f" additions or only by removals, got {_names(theirs)}"
        )


def _adapted(fresh: ParamsEMAState, old: ParamsEMAState) -> ParamsEMAState:
    """The fresh state with the old average and all other values that both have."""
    adapted = fresh._replace(
        step=old.step, count=old.count, params_ema=_take_tree(fresh.params_ema, old.params_ema)
    )
    if _both_have("remainder", fresh, old):
        adapted = adapted._replace(remainder=_take_tree(fresh.remainder, old.remainder))
    if _both_have("skipped", fresh, old):
        adapted = adapted._replace(skipped=old.skipped)
    return adapted


def _take_tree(fresh: Any, old: Any) -> Any:
    structure: Any
    flat, structure = jax.tree_util.tree_flatten_with_path(fresh)
    theirs, _ = jax.tree_util.tree_flatten_with_path(old)
    return structure.unflatten(_take(flat, theirs, positions=True))


def _both_have(field: str, *states: ParamsEMAState) -> bool:
    return all(jax.tree.leaves(getattr(state, field)) for state in states)


def _state(node: Mapping[str, Any], labels: Labels) -> ParamsEMAState:
    names = node.get("name") or {} if "name" in node else dict.fromkeys(labels, ())
    skipped = jax.tree.leaves(node.get("skipped"))
    return ParamsEMAState(
        step=_counter(node, "step"),
        count=_counter(node, "count"),
        params_ema=node["params_ema"],
        name=dict(names) or (),
        remainder=node.get("remainder", ()),
        skipped=skipped[0] if skipped else (),
    )


def _counter(node: Mapping[str, Any], name: str) -> Any:
    """A counter; in an nnx.State it is one level deeper."""
    leaves = jax.tree.leaves(node[name])
    if len(leaves) != 1:
        raise ModelError(f"`{name}` of an average in `opt_state` must be one number")
    return leaves[0]


def _split(path: Any, *, positions: bool = False) -> tuple[Key, Order]:
    """The names on a path and, apart from them, the positions in tuples and lists.

    An nnx Variable and a boxed linen param have a level of their own, called ``value``. It is left
    out here, because params from nnx.as_pure do not have it.
    """
    entries = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
    if entries and entries[-1] == "value":
        del entries[-1]
    if positions:
        return tuple(entries), ()
    names = tuple(entry for entry in entries if not entry.isdigit())
    return names, tuple(int(entry) for entry in entries if entry.isdigit())


def _order(pair: tuple[Order, Any]) -> Order:
    return pair[0]


def _describe(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _names(labels: list[Labels]) -> str:
    return ", ".join(" and ".join(map(repr, names)) or "(unnamed)" for names in labels) or "none"
