"""Take back what a forward pass leaves on the modules that it runs through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

from torch import nn

__all__ = ["attributes_put_back"]


@contextmanager
def attributes_put_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """After the block every attribute of these modules refers to what it referred to before.

    This holds for plain attributes (an auxiliary loss, a counter), and for parameters, buffers and
    submodules that are registered or replaced. What an attribute refers to is not copied: a list or
    tensor that the block changes in place stays changed.
    """
    before = [(holder, dict(holder)) for module in modules for holder in _holders(module)]
    try:
        yield
    finally:
        for holder, kept in before:
            if len(holder) != len(kept) or not all(map(is_, holder.values(), kept.values())):
                for added in holder.keys() - kept.keys():
                    del holder[added]
                holder.update(kept)


def _holders(module: nn.Module) -> list[dict[str, Any]]:
    """The dicts that hold what a module has; a scripted module keeps some of them elsewhere."""
    registered = module._parameters, module._buffers, module._modules
    return [vars(module), *(holder for holder in registered if isinstance(holder, dict))]
