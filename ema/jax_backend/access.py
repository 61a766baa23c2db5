"""``get_params_ema``: read the average out of any optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ema.errors import ArgumentError, ModelError, difference, listing
from ema.jax_backend.placement import check_placement
from ema.jax_backend.selection import is_array, is_inexact
from ema.jax_backend.state import ParamsEMAState
from ema.jax_backend.trees import Flat, is_hole, plain, unboxed
from ema.options import unknown_name

__all__ = ["choose_states", "get_params_ema"]

Key = tuple[str, ...]


def get_params_ema(
    opt_state: optax.OptState, params: optax.Params | None = None, name: str | None = None
) -> Any:
    """The averaged parameters of an optimizer state.

    Finds the :class:`~ema.jax_backend.ParamsEMAState` wherever it is: in a chain, in
    ``optax.masked``, ``MultiSteps``, ``apply_if_finite``, ``partition`` or ``inject_hyperparams``,
    in a ``TrainState`` or an ``nnx.Optimizer``.

    Args:
        opt_state: the optimizer's state, or anything that contains it.
        params: the live parameters; for nnx, ``nnx.state(model, nnx.Param)``. If they are given,
            the result has their dtypes, and leaves that are not averaged (integers, masked leaves)
            have their live values. The averages of several groups (one name, disjoint masks) are
            joined.
        name: which average, if there are several: the ``name`` given to ``params_ema``, or the
            key in its ``decay``.

    Returns:
        Plain arrays in the structure of the params; for nnx, pass them to
        ``nnx.update(model, …)``. Without ``params`` they have the accumulator's dtype. If the
        dtypes agree, nothing is copied: the result shares its arrays with ``opt_state``, and
        donating ``opt_state`` deletes them.

    Raises:
        ArgumentError: there is no such average, there are several, or leaves are masked and
            ``params`` were not given.
        ModelError: ``params`` do not match the average.
        StateError: the average is inside ``schedule_free``, ``mechanize`` or ``lookahead``, or
            after ``sam``, and so does not average the parameters.

    Warns:
        EMAWarning: an optimizer follows ``params_ema`` in the chain.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from ema.jax_backend import params_ema
        >>> tx = params_ema({"short": 0.9, "long": 0.99})
        >>> params = jnp.ones(2, jnp.bfloat16)
        >>> get_params_ema(tx.init(params), name="long")
        Array([1., 1.], dtype=float32)
        >>> get_params_ema(tx.init(params), params, name="long")
        Array([1, 1], dtype=bfloat16)
    """
    states, label = choose_states(opt_state, name)
    averages = [plain(state.averages()[label]) for state in states]
    if params is not None:
        live = plain(params)
        filled = _fill([unboxed(average) for average in averages], unboxed(live))
        return jax.tree.unflatten(jax.tree.structure(live), jax.tree.leaves(filled))
    if len(averages) > 1:
        raise ArgumentError(
            f"`params` must be given to join {len(averages)} averages with the same name; to keep"
            " them apart, give each its own name: params_ema(..., name=...)"
        )
    masked = [name for name, leaf in Flat.of(averages[0]).items() if _is_masked(leaf)]
    if masked:
        raise ArgumentError(
            f"`params` must be given to fill the leaves that are not averaged: {listing(masked)}"
        )
    return averages[0]


def choose_states(
    opt_state: optax.OptState, name: str | None
) -> tuple[list[ParamsEMAState], str | None]:
    """The states that hold the average called ``name``, and its name, which may be None.

    Without ``name`` the state must hold only one average. If optax has split the params into
    groups, several states hold one average.

    Raises:
        ArgumentError: there is no such average, or there are several.
        StateError: see :func:`~ema.jax_backend.placement.check_placement`.

    Warns:
        EMAWarning: likewise.
    """
    check_placement(opt_state)
    states = [
        node
        for node in jax.tree.leaves(opt_state, is_leaf=lambda n: isinstance(n, ParamsEMAState))
        if isinstance(node, ParamsEMAState)
    ]
    if not states:
        raise ArgumentError(
            "`opt_state` must contain the state of params_ema, got"
            f" {type(opt_state).__name__} without one: optax.chain(..., params_ema(...))"
        )
    names = list(dict.fromkeys(label for state in states for label in state.averages()))
    if name is None and len(names) == 1:
        return states, names[0]
    if name is None and None in names:
        raise ArgumentError(
            f"`name` must choose one of {len(names)} averages, but one of them has no name: give"
            " each a name in params_ema"
        )
    if name not in names:
        raise unknown_name(name, [each for each in names if each is not None])
    return [state for state in states if name in state.averages()], name


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


class _Averaged(NamedTuple):
    """The groups of one average, joined; a key is the path of a leaf.

    Attributes:
        leaves: the averages.
        masked: for each group, the paths of its masks; a mask may stand for a whole subtree.
        absent: the paths of leaves that a program filtered out because it does not train them.
    """

    leaves: dict[Key, Any]
    masked: list[set[Key]]
    absent: set[Key]

    def lacks(self, key: Key, live: Any) -> bool:
        """Whether this live leaf should have an average but does not."""
        if key in self.leaves:
            return False
        if key in self.absent and not (is_inexact(live) and is_array(live)):
            return False
        above = [key[:length] for length in range(len(key) + 1)]
        return not all(any(part in holes for part in above) for holes in self.masked)


def _fill(averages: list[Any], params: Any) -> Any:
    """The params with each averaged leaf in place of the live one.

    Leaves are matched by path, since a mask may stand for a whole subtree.
    """
    averaged = _put_together(averages)
    structure: Any
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    live = {_key(path): leaf for path, leaf in flat}
    if text := _separates(averaged, live):
        raise ModelError(f"`params` do not match the average: {text}")
    return structure.unflatten(
        [
            jnp.asarray(averaged.leaves[key]).astype(jnp.result_type(leaf))
            if key in averaged.leaves
            else leaf
            for key, leaf in live.items()
        ]
    )


def _put_together(averages: list[Any]) -> _Averaged:
    """Join the groups of one average.

    Raises:
        ArgumentError: two groups have an average of the same leaf.
    """
    together = _Averaged({}, [], set())
    for average in averages:
        flat, _ = jax.tree_util.tree_flatten_with_path(average, is_leaf=is_hole)
        leaves = {_key(path): leaf for path, leaf in flat if not is_hole(leaf)}
        if twice := [".".join(key) for key in leaves if key in together.leaves]:
            raise ArgumentError(
                f"`name` must choose one average, but {len(averages)} averages with the same name"
                f" hold {listing(twice)}: give each its own name in params_ema"
            )
        together.leaves.update(leaves)
        together.masked.append({_key(path) for path, leaf in flat if _is_masked(leaf)})
        together.absent.update(_key(path) for path, leaf in flat if leaf is None)
    return together


def _separates(averaged: _Averaged, live: Mapping[Key, Any]) -> str:
    """The difference between an average and live params; empty if they fit."""
    mismatched = [
        f"`{'.'.join(key)}` has shape {jnp.shape(live[key])}, its average has {jnp.shape(average)}"
        for key, average in averaged.leaves.items()
        if key in live and jnp.shape(live[key]) != jnp.shape(average)
    ]
    return difference(
        [".".join(key) for key in averaged.leaves if key not in live],
        [".".join(key) for key, leaf in live.items() if averaged.lacks(key, leaf)],
        mismatched,
    )


def _key(path: Any) -> Key:
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
