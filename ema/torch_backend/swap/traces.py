"""Undo the changes that a forward pass makes to attributes of its modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["attributes_put_back"]


@contextmanager
def attributes_put_back(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore every attribute of these modules after the block.

    This holds for plain attributes (an auxiliary loss, a counter), and for parameters, buffers and
    submodules that are registered or replaced. The objects themselves are not copied: a list or
    tensor that the block changes in place stays changed.
    """
    before = [(holder, holder.copy()) for module in modules for holder in _holders(module)]
    try:
        yield
    finally:
        for holder, kept in before:
            holder.update(kept)
            if len(holder) != len(kept):
                for added in holder.keys() - kept.keys():
                    del holder[added]


def _holders(module: nn.Module) -> Iterator[dict[str, Any]]:
    """The dicts of a module's attributes and tensors; a scripted module keeps some elsewhere."""
    yield vars(module)
    for registered in (module._parameters, module._buffers, module._modules):
        if isinstance(registered, dict):
            yield registered
