"""Words in the names of a checkpoint's parts that say what a part holds."""

from __future__ import annotations

import re

__all__ = ["MAYBE", "NO_WEIGHTS", "OF_ALL", "OPTIMIZERS", "SURE", "may_be_of", "words"]

SURE = {"ema", "swa", "polyak", "averaged", "shadow"}
"""Words that always mean an average."""

MAYBE = {"teacher", "target", "average", "avg", "momentum"}
"""Words that mean an average, a copy of raw weights, or another model."""

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
"""Words that the name of any weights may have."""

_LIVE = {"student", "online", "live", "raw", "current"}
"""Words for the weights in training."""

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
"""Words for optimizers and the like, which hold moments of gradients."""


def words(name: str) -> set[str]:
    """Split a name into lower-case words.

    ``G_ema``, ``modelEMA`` and ``ema-params`` contain the word ``ema``; ``schema`` does not.
    """
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def may_be_of(average: set[str], weights: set[str]) -> bool:
    """Whether a part with the words ``average`` may average the part with the words ``weights``.

    ``g_ema`` may average ``g`` or ``model``.
    """
    of, called = average - SURE - OF_ALL, weights - OF_ALL
    return average <= SURE or called == of or called <= _LIVE
