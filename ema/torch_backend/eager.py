"""Functions that run as they are written, also within what ``torch.compile`` has compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["eager"]

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Keep Dynamo out of ``function`` and of whatever that calls.

    Traced, integers of NumPy become tensors that cannot be shifted, and calls into C that nothing
    can part are parted. ``torch.compiler.disable`` does it, and loads Dynamo: so not before there
    is anything compiled.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():  # this very line is being traced
            hidden: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return hidden(*args, **kwargs)
        return function(*args, **kwargs)

    return call
