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
    """``isinstance`` without an import: a class that is not loaded has no instances."""
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
        parameters: in the order of the modules; a tied one, or one of a shared module, stands
            under each of its names.
        buffers: likewise.
        paths: canonical name to the path in the model as it is wrapped now.
        owners: canonical name to the module that has the tensor.
        modules: every module once.
    """

    parameters: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    buffers: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    owners: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    modules: list[nn.Module] = dataclasses.field(default_factory=list)

    def add(
        self, kind: dict[str, Tensor], name: str, path: str, owner: nn.Module, tensor: Tensor
    ) -> None:
        """Note a parameter or a buffer, whichever ``kind`` holds.

        Raises:
            ModelError: another tensor has the same canonical name.
        """
        if name in self.paths:
            if kind.get(name) is tensor:
                return
            raise ModelError(
                f"`{self.paths[name]}` and `{path}` are both called `{name}` without the prefixes"
                " of wrappers"
            )
        kind[name] = tensor
        self.paths[name] = path
        self.owners[name] = owner


def named_tensors(model: nn.Module) -> NamedTensors:
    """Walk the module tree once.

    Raises:
        ArgumentTypeError: ``model`` is not a module.
        ModelError: two tensors have the same canonical name.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    found = NamedTensors()
    seen: set[int] = set()
    for prefix, path, module in _walk(model, "", "", ()):
        if id(module) not in seen:
            seen.add(id(module))
            found.modules.append(module)
        for kind, own in (
            (found.parameters, module._parameters),
            (found.buffers, module._buffers),
        ):
            for key, tensor in own.items():
                if tensor is not None:
                    found.add(kind, prefix + key, path + key, module, tensor)
    return found


def _walk(
    module: nn.Module, prefix: str, path: str, above: tuple[nn.Module, ...]
) -> Iterator[tuple[str, str, nn.Module]]:
    """Canonical prefix, path and module; parents first, a shared module at each of its places."""
    if any(module is parent for parent in above):  # a module that holds itself
        return
    yield prefix, path, module
    wrapped = _wrapped_child(module)
    for name, child in module._modules.items():
        if child is not None:
            inner = prefix if name == wrapped else f"{prefix}{name}."
            yield from _walk(child, inner, f"{path}{name}.", (*above, module))
