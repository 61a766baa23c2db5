"""PyTorch's caches of values that it has computed from weights; they must not outlive the weights.

Autocast casts a weight once a block. ``torch.nn.utils.parametrize.cached()`` computes a
parametrized weight once a block, and keeps it under the ``id`` of the module, whatever weights the
module has by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from ema.torch_backend.calls import Call

__all__ = ["clearing", "forget_parametrizations", "parametrizations_put_aside"]


def clearing() -> list[Call]:
    """Steps that empty these caches; make them soon, since PyTorch may begin another cache."""
    return [torch.clear_autocast_cache, parametrize._cache.clear]


def forget_parametrizations(module: nn.Module) -> None:
    """Empty the cache of parametrized weights of one module only."""
    if cache := parametrize._cache:
        within = {id(child) for child in module.modules()}
        for key in [key for key in cache if key[0] in within]:
            del cache[key]


@contextmanager
def parametrizations_put_aside() -> Iterator[None]:
    """An empty cache of parametrized weights inside the block, and the one from before after it."""
    before = parametrize._cache
    parametrize._cache = {}
    try:
        yield
    finally:
        parametrize._cache = before
