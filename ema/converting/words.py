"""Words in the names of a checkpoint that say what a part is."""

from __future__ import annotations

import re

__all__ = ["MAYBE", "NO_WEIGHTS", "OF_ALL", "OPTIMIZERS", "SURE", "may_be_of", "words"]

SURE = {"ema", "swa", "polyak", "averaged", "shadow"}
"""Words for an average."""

MAYBE = {"teacher", "target", "average", "avg", "momentum"}
"""Words for an average, a hard copy of raw weights, or another model."""

OF_ALL = {
    "model",
    "models",
    "net",
    "network",
    "module",
    "weights",
    "weight",
    "variables",
    "state",
    "dict",
    "params",
    "param",
    "parameters",
}
"""Words that every name of weights may have."""

_LIVE = {"student", "online", "live", "raw", "current"}
"""Words for weights that are trained."""

NO_WEIGHTS = {
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
}
"""Words for tensors that are not weights."""

OPTIMIZERS = {"opt", "optim", "optimizer", "optimizers", "scheduler", "scaler"}
"""Words for what holds moments of gradients, and averages of them."""


def words(name: str) -> set[str]:
    """``G_ema``, ``modelEMA`` and ``ema-params`` say ``ema``; ``schema`` does not."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def may_be_of(average: set[str], weights: set[str]) -> bool:
    """Whether the first words may name an average of the second: ``g_ema`` averages ``g`` or ``model``."""
    of, called = average - SURE - OF_ALL, weights - OF_ALL
    return average <= SURE or called == of or called <= _LIVE
