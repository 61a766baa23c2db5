"""Canonical names: the path of a tensor in the module tree, whatever wraps the model.

The prefixes that DDP, ``torch.compile`` and activation checkpointing put in are left out, so that
a state fits before and after wrapping. Wrappers are known by their type, never by the name of a
child: a user's own submodule may be called ``module``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

from torch import Tensor, nn

from ema.errors import ArgumentTypeError, ModelError

__all__ = ["NamedTensors", "is_of", "named_tensors", "unwrap"]

_WRAPPERS = (  # home of the class, class, and the name of the child that it wraps
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)


def is_of(thing: object, home: str, name: str) -> bool:
    """``isinstance`` without importing: of a class that is not loaded there are no instances."""
    kind = getattr(sys.modules.get(home), name, None)
    return kind is not None and isinstance(thing, kind)


def _wrapped_child(module: nn.Module) -> str | None:
    return next((child for home, name, child in _WRAPPERS if is_of(module, home, name)), None)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside all wrappers."""
    while (child := _wrapped_child(model)) is not None:
        model = getattr(model, child)
    return model


@dataclasses.dataclass(frozen=True)
class NamedTensors:
    """All tensors of a model by canonical name.

    Attributes:
        parameters: in the order of the modules; a tied one stands under each of its names.
        buffers: likewise.
        paths: canonical name to the path in the model as it is wrapped now.
        modules: every module once.
    """

    parameters: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    buffers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    modules: list[nn.Module] = dataclasses.field(default_factory=list)


def named_tensors(model: nn.Module) -> NamedTensors:
    """Walk the module tree once.

    Raises:
        ArgumentTypeError: ``model`` is no module.
        ModelError: two tensors have the same canonical name.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    found = NamedTensors()
    for prefix, path, module in _walk(model, "", "", set()):
        found.modules.append(module)
        for tensors, own in (
            (found.parameters, module._parameters),
            (found.buffers, module._buffers),
        ):
            for key, tensor in own.items():
                if tensor is None:
                    continue
                name = prefix + key
                if name in found.paths:
                    raise ModelError(
                        f"`{found.paths[name]}` and `{path + key}` are both called `{name}`"
                        " without the prefixes of wrappers"
                    )
                found.paths[name] = path + key
                tensors[name] = tensor
    return found


def _walk(
    module: nn.Module, prefix: str, path: str, seen: set[int]
) -> Iterator[tuple[str, str, nn.Module]]:
    """Canonical prefix, path and module; parents first, each module once."""
    if id(module) in seen:
        return
    seen.add(id(module))
    yield prefix, path, module
    wrapped = _wrapped_child(module)
    for name, child in module._modules.items():
        if child is not None:
            inner = prefix if name == wrapped else f"{prefix}{name}."
            yield from _walk(child, inner, f"{path}{name}.", seen)
