"""Misplaced averages that can be recognized from an optimizer's state.

``params_ema`` averages ``params + updates``, so it must see the updates that are applied. It cannot
see its own place in a chain, but the state of the chain shows the order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax import contrib

from ema.errors import StateError, warn
from ema.jax_backend.state import ParamsEMAState

__all__ = ["check_placement"]

HARMLESS = (optax.EmptyState, optax.SnapshotState, optax.MonitorState, ParamsEMAState)
"""States of transforms that change no update, and ``EmptyState``, which says nothing about one."""

_INSIDE: Mapping[type, tuple[str, str]] = {
    contrib.ScheduleFreeState: (
        "base_optimizer_state",
        (
            "params_ema inside schedule_free does not average the parameters but another sequence:"
            " schedule_free has an average of its own (schedule_free_eval_params); to average its"
            " training parameters, chain params_ema after it"
        ),
    ),
    contrib.MechanicState: (
        "base_optimizer_state",
        (
            "params_ema inside mechanize averages parameters that the model never has: mechanize"
            " scales the updates of the optimizer in it; chain params_ema after it"
        ),
    ),
    optax.LookaheadState: (
        "fast_state",
        (
            "params_ema inside lookahead misses the synchronizations, which set the fast parameters"
            " back: chain params_ema after it to average both the fast and the slow parameters"
        ),
    ),
    contrib.SAMState: (
        "adv_state",
        (
            "params_ema inside the adversarial optimizer of sam averages the perturbed parameters:"
            " put it inside the other optimizer of sam"
        ),
    ),
}
"""By state of a wrapper: the field of the wrapped optimizer, and why an average is wrong there."""


def check_placement(opt_state: Any) -> None:
    """Report a ``params_ema`` whose place in the chain prevents it from averaging the parameters.

    Raises:
        StateError: it is inside a wrapper that changes the updates of its optimizer
            (``schedule_free``, ``mechanize``, ``lookahead``), or after ``sam``, which perturbs the
            parameters for a gradient in every second step.

    Warns:
        EMAWarning: an optimizer follows it in the chain.
    """
    for node in _wrappers(opt_state):
        field, reason = _INSIDE[type(node)]
        if _holds_average(getattr(node, field)):
            raise StateError(reason)
    for chain in _chains(opt_state):
        averages = [i for i, state in enumerate(chain) if _holds_average(state)]
        if not averages:
            continue
        if any(map(_alternates, chain[: averages[-1]])):
            raise StateError(
                "params_ema after sam averages the perturbed parameters too: put it inside,"
                " sam(chain(optimizer, params_ema(…)), …), or set opaque_mode=True"
            )
        later = [node for state in chain[averages[-1] + 1 :] for node in _optimizer_states(state)]
        if later:
            names = ", ".join(sorted({type(node).__name__ for node in later}))
            warn(
                f"params_ema stands before {names} in the chain and averages parameters that the"
                " model never has: make it the last link"
            )


def _wrappers(node: Any) -> list[Any]:
    """Every state of a wrapper outside the averages, also inside other wrappers."""
    if isinstance(node, ParamsEMAState):
        return []
    level = jax.tree_util.default_registry.flatten_one_level(node)
    found = [node] if type(node) in _INSIDE else []
    return found + [each for child in (level[0] if level else []) for each in _wrappers(child)]


def _alternates(state: Any) -> bool:
    """Whether sam perturbs the params themselves: then it caches the unperturbed params."""
    return any(
        isinstance(node, contrib.SAMState) and node.cache is not None for node in _wrappers(state)
    )


def _is_plain_tuple(node: Any) -> bool:
    return type(node) is tuple


def _holds_average(node: Any) -> bool:
    return any(
        isinstance(leaf, ParamsEMAState)
        for leaf in jax.tree.leaves(node, is_leaf=lambda n: isinstance(n, ParamsEMAState))
    )


def _chains(node: Any) -> list[tuple[Any, ...]]:
    """Every plain tuple outside the averages: these are the states of ``optax.chain``."""
    if isinstance(node, ParamsEMAState):
        return []
    level = jax.tree_util.default_registry.flatten_one_level(node)
    children = [] if level is None else level[0]
    found = [node] if _is_plain_tuple(node) else []
    return found + [chain for child in children for chain in _chains(child)]


def _optimizer_states(node: Any) -> list[Any]:
    """The states of optax's own transforms in an element of a chain, which may be another chain."""
    if _is_plain_tuple(node):
        return [state for child in node for state in _optimizer_states(child)]
    of_optax = type(node).__module__.startswith("optax.")
    return [node] if of_optax and not isinstance(node, HARMLESS) else []
