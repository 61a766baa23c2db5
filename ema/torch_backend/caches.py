"""PyTorch's caches of what it has computed from weights, which must not outlive the weights.

Autocast casts a weight once a block. ``torch.nn.utils.parametrize.cached()`` computes a
parametrized weight once a block, and keeps it under the ``id`` of the module, whatever weights the
module has by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils import parametrize

from ema.torch_backend.steps import Step

__all__ = ["clearing", "parametrizations_put_aside"]


def clearing() -> list[Step]:
    """Steps that empty these caches; make them soon, since PyTorch may begin another cache."""
    return [torch.clear_autocast_cache, parametrize._cache.clear]


@contextmanager
def parametrizations_put_aside() -> Iterator[None]:
    """An empty cache of parametrized weights inside the block, and the one from before after it."""
    before = parametrize._cache
    parametrize._cache = {}
    try:
        yield
    finally:
        parametrize._cache = before
