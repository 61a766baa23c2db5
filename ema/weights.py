"""Ask any schedule for its weights on the host, and check them.

The schedules of this library answer with a float in [0, 1] to whatever they are asked. A schedule
of the user's own may take Python floats only, ignore ``xp`` and ``span``, and answer with anything.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ema.errors import ArgumentError, ArgumentTypeError
from ema.schedules import FLOAT_MATH, Namespace, Scalar, Schedule, is_ours

__all__ = ["ask", "checked_weight", "weight_of", "weights_of"]

_ROUNDING = 1e-12
"""How far outside of [0, 1] a float64 formula may be; the weight is then 0 or 1."""

_PROBES = 16
"""Weights of an array that are compared with those of single updates."""


def weight_of(schedule: Schedule, count: int, span: int) -> float:
    """The weight of update ``count``, as a Python float in [0, 1].

    Args:
        schedule: of this library or not.
        count: number of the update, from 1.
        span: steps from one update to the next.

    Raises:
        ArgumentError: the schedule answers with NaN or a number outside [0, 1].
        ArgumentTypeError: it answers with something other than one number.
    """
    weight = ask(schedule, float(count), span, FLOAT_MATH)
    if type(weight) is float and 0.0 <= weight <= 1.0:
        return weight
    return checked_weight(schedule, weight, count)


def weights_of(schedule: Schedule, counts: NDArray[np.float64], span: int) -> NDArray[np.float64]:
    """The weights of many updates; of no dimension where they are equal at all of them.

    Args:
        schedule: of this library or not.
        counts: numbers of updates, at least one.
        span: steps from one update to the next.

    Raises:
        ArgumentError: see :func:`weight_of`.
        ArgumentTypeError: likewise.
    """
    if is_ours(schedule):
        return np.asarray(schedule.weight(counts, span, np))
    weights = _weights_at_once(schedule, counts, span)
    if weights is None:
        weights = np.array([weight_of(schedule, int(count), span) for count in counts])
    return weights


def ask(schedule: Schedule, count: Scalar, span: Scalar, xp: Namespace) -> Scalar:
    """``schedule.weight(count, span, xp)``, without the arguments that its method does not take."""
    if is_ours(schedule):
        return schedule.weight(count, span, xp)
    return _question(type(schedule))(schedule, count, span, xp)


def checked_weight(schedule: Schedule, weight: Any, count: int | None) -> float:
    """The answer of a schedule as a Python float in [0, 1].

    Args:
        schedule: for the error.
        weight: a number, or an array or tensor of no dimension.
        count: number of the update, for the error; None where it is not known.

    Raises:
        ArgumentError: see :func:`weight_of`.
        ArgumentTypeError: likewise.
    """
    at = "" if count is None else f" at update {count}"
    number = weight
    if hasattr(number, "item") and getattr(number, "shape", None) == ():
        number = number.item()
    if not isinstance(number, numbers.Real):
        raise ArgumentTypeError(
            f"the weight of `{schedule!r:.200}` must be a number, got {weight!r:.80}{at}"
        )
    number = float(number)
    if not -_ROUNDING <= number <= 1.0 + _ROUNDING:
        raise ArgumentError(
            f"the weight of `{schedule!r:.200}` must lie in [0, 1], got {number}{at}"
        )
    return min(1.0, max(0.0, number))


def _weights_at_once(
    schedule: Schedule, counts: NDArray[np.float64], span: int
) -> NDArray[np.float64] | None:
    """The weights from one call with an array; None where the schedule takes no arrays.

    Code that is written for single numbers may raise, or answer with something else: some of the
    weights are compared.
    """
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            answer = np.asarray(ask(schedule, counts, span, np), np.float64)
            weights = np.broadcast_to(answer, counts.shape)
    except Exception:  # whatever code of the user's own raises about an array
        return None
    if not np.all((weights >= 0.0) & (weights <= 1.0)):
        return None  # asked one by one, the update that is wrong is found
    for index in np.linspace(0, len(counts) - 1, _PROBES).astype(int):
        single = weight_of(schedule, int(counts[index]), span)
        if not math.isclose(weights[index], single, rel_tol=1e-6, abs_tol=1e-12):
            return None
    return weights


@functools.lru_cache(maxsize=128)
def _question(cls: type[Schedule]) -> Callable[[Any, Scalar, Scalar, Namespace], Scalar]:
    """How the class of a schedule is asked for a weight, by the signature of its method."""
    forms: tuple[tuple[tuple[int, ...], dict[str, Any], Callable[..., Scalar]], ...] = (
        ((0, 0, 0, 0), {}, lambda s, count, span, xp: s.weight(count, span, xp)),
        ((0, 0, 0), {"xp": 0}, lambda s, count, span, xp: s.weight(count, span, xp=xp)),
        ((0, 0, 0), {}, lambda s, count, span, xp: s.weight(count, span)),  # noqa: ARG005
        ((0, 0), {}, lambda s, count, span, xp: s.weight(count)),  # noqa: ARG005
    )
    try:
        signature = inspect.signature(cls.weight)
    except (TypeError, ValueError):  # of compiled code
        return forms[0][2]
    for positional, named, question in forms:
        try:
            signature.bind(*positional, **named)
        except TypeError:
            continue
        return question
    return forms[0][2]
