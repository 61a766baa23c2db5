"""What of a misplaced average can be seen from an optimizer's state.

``params_ema`` averages ``params + updates``, so it has to see the updates that are applied. Where
it stands is known to optax alone, but the order of a chain shows in the state.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import optax
from optax import contrib

from ema.errors import EMAWarning, StateError
from ema.jax_backend.state import ParamsEMAState

__all__ = ["check_placement"]

HARMLESS = (optax.EmptyState, optax.SnapshotState, optax.MonitorState, ParamsEMAState)
"""States of transforms that change no update, and the one that says nothing."""


def check_placement(opt_state: Any) -> None:
    """Report an average that cannot be one of the parameters.

    Raises:
        StateError: it is inside ``schedule_free``, whose inner updates are not applied to the
            params but to another sequence.

    Warns:
        EMAWarning: an optimizer follows it in the chain.
    """
    for node in jax.tree.leaves(opt_state, is_leaf=_is_schedule_free):
        if _is_schedule_free(node) and _holds_average(node.base_optimizer_state):
            raise StateError(
                "params_ema inside schedule_free averages what is no sequence of parameters:"
                " schedule_free has an average of its own (schedule_free_eval_params); to average"
                " its training parameters chain params_ema after it"
            )
    for chain in _chains(opt_state):
        averages = [i for i, state in enumerate(chain) if _holds_average(state)]
        if not averages:
            continue
        later = [node for state in chain[averages[-1] + 1 :] for node in _optimizer_states(state)]
        if later:
            names = ", ".join(sorted({type(node).__name__ for node in later}))
            warnings.warn(
                f"params_ema stands before {names} in the chain and averages parameters that were"
                " never there: it has to be the last link",
                EMAWarning,
                stacklevel=3,
            )


def _is_schedule_free(node: Any) -> bool:
    return isinstance(node, contrib.ScheduleFreeState)


def _is_plain_tuple(node: Any) -> bool:
    return type(node) is tuple


def _holds_average(node: Any) -> bool:
    return any(
        isinstance(leaf, ParamsEMAState)
        for leaf in jax.tree.leaves(node, is_leaf=lambda n: isinstance(n, ParamsEMAState))
    )


def _chains(node: Any) -> list[tuple[Any, ...]]:
    """Every plain tuple outside the averages: the states of ``optax.chain``."""
    if isinstance(node, ParamsEMAState):
        return []
    level = jax.tree_util.default_registry.flatten_one_level(node)
    children = [] if level is None else level[0]
    found = [node] if _is_plain_tuple(node) else []
    return found + [chain for child in children for chain in _chains(child)]


def _optimizer_states(node: Any) -> list[Any]:
    """The states of optax's own transforms in one element of a chain, which may be a chain."""
    if _is_plain_tuple(node):
        return [state for child in node for state in _optimizer_states(child)]
    of_optax = type(node).__module__.startswith("optax.")
    return [node] if of_optax and not isinstance(node, HARMLESS) else []
