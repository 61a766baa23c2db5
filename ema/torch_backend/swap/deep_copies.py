"""Deep copies of a module, with replacements for some objects and without autograd histories."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ema.errors import ModelError

__all__ = ["copy_of"]

_CONTAINERS = (list, tuple, set, frozenset, deque)
_UNSEARCHED = (type, FunctionType, ModuleType)


def copy_of(model: nn.Module, given: Mapping[int, Any]) -> nn.Module:
    """A deep copy of ``model``, with its attributes and hooks.

    Tensors with a history (a loss that ``forward`` has kept, the weight that an old
    ``torch.nn.utils.weight_norm`` has computed) cannot be copied and are None in the copy.

    Args:
        model: stays as it is.
        given: by ``id`` of an object within the model, its replacement in the copy, which is used
            as it is.

    Raises:
        ModelError: something cannot be copied, with the path of its module and its attribute.
    """
    memo = {**{id(tensor): None for tensor in _with_history(model, given)}, **given}
    try:
        copied = copy.deepcopy(model, dict(memo))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(_reason(model, memo, error)) from error
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            _cache_apart(module)
    return copied


def _cache_apart(module: nn.Module) -> None:
    """Give a copied module its own entries in the cache of ``parametrize.cached()``.

    PyTorch makes a class for each module that is parametrized, and its properties cache weights
    under the ``id`` of that module. A copy has the same class, and would get the original's weights.
    """
    module.__class__ = parametrize.type_before_parametrizations(module)
    parametrize._inject_new_class(module)
    for name in cast("nn.ModuleDict", module.parametrizations):
        parametrize._inject_property(module, name)


def _with_history(model: nn.Module, given: Mapping[int, Any]) -> Iterator[Tensor]:
    """Tensors that autograd has computed, in attributes and in containers there."""
    seen = set(given)
    left: list[Any] = [model]
    while left:
        thing = left.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            if not thing.is_leaf:
                yield thing
        elif isinstance(thing, Mapping):
            left.extend(thing.values())
        elif isinstance(thing, _CONTAINERS):
            left.extend(thing)
        elif not isinstance(thing, _UNSEARCHED):
            left.extend(getattr(thing, "__dict__", {}).values())


def _reason(model: nn.Module, memo: Mapping[int, Any], error: Exception) -> str:
    """The objects that cannot be copied, and why."""
    # an attribute that refers to a module of the model is not the cause
    memo = {**memo, **{id(module): module for module in model.modules()}}
    for path, module in model.named_modules():
        for name, value in _attributes(module):
            try:
                copy.deepcopy(value, dict(memo))
            except Exception as cause:
                full = f"{path}.{name}" if path else name
                kind = type(value).__name__
                return f"`{full}` is a {kind} that cannot be copied with its module: {cause}"
    return f"the model, a {type(model).__name__}, cannot be copied: {error}"


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name in {"_parameters", "_buffers"}:
            yield from value.items()
        elif name != "_modules" and not (isinstance(value, dict) and not value):
            yield name, value
