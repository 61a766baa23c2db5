"""Rename and transform the tensors of a file, to fit a model that names or stores them differently."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from ema.errors import ArgumentError, ArgumentTypeError, listing

__all__ = ["Rename", "Transform", "check_transform", "renamed", "transformed"]

Rename = Callable[[str], str | None] | Mapping[str, str | None] | None
"""Maps a name in the file to the model's name. None as the new name leaves the tensor out."""

Transform = Callable[[str, Any], Any] | Mapping[str, Callable[[Any], Any]] | None
"""Changes a tensor, given its new name. Tensors that a table does not name stay as they are."""


def renamed(names: Iterable[str], rename: Rename) -> dict[str, str]:
    """Map the new name of each tensor to its name in the file. Tensors that are left out do not appear.

    Raises:
        ArgumentError: two tensors get the same name, or a table has a name that the file lacks.
        ArgumentTypeError: a new name is not a string, or ``rename`` is neither a table nor a function.
    """
    names = list(names)
    if isinstance(rename, Mapping):
        table = rename
        if unknown := [name for name in table if name not in set(names)]:
            raise ArgumentError(f"`rename` must have names of the file, got {listing(unknown)}")
        new = [table.get(name, name) for name in names]
    elif rename is None:
        new = list(names)
    elif callable(rename):
        new = [rename(name) for name in names]
    else:
        raise ArgumentTypeError(f"`rename` must be a table or a function, got {rename!r:.80}")
    old_of: dict[str, str] = {}
    for old, name in zip(names, new, strict=True):
        if name is None:
            continue
        if not isinstance(name, str):
            raise ArgumentTypeError(f"`rename` must give strings, got {name!r:.80} for {old!r}")
        if name in old_of:
            raise ArgumentError(
                f"`rename` gives `{old_of[name]}` and `{old}` the same name, `{name}`"
            )
        old_of[name] = old
    return old_of


def check_transform(transform: Transform, names: Collection[str]) -> None:
    """Refuse a table with a name that no tensor gets: its function would silently change nothing.

    Raises:
        ArgumentError: the table has such a name.
        ArgumentTypeError: ``transform`` is neither a table of functions nor a function.
    """
    if isinstance(transform, Mapping):
        if unknown := [name for name in transform if name not in names]:
            raise ArgumentError(
                f"`transform` must have new names of tensors, got {listing(unknown)}"
            )
        if odd := [name for name, function in transform.items() if not callable(function)]:
            raise ArgumentTypeError(
                f"`transform` must hold functions, but does not for {listing(odd)}"
            )
    elif not (transform is None or callable(transform)):
        raise ArgumentTypeError(f"`transform` must be a table or a function, got {transform!r:.80}")


def transformed(name: str, tensor: Any, transform: Transform) -> Any:
    """Apply ``transform`` to the tensor that the model calls ``name``."""
    if isinstance(transform, Mapping):
        function = transform.get(name)
        return tensor if function is None else function(tensor)
    return tensor if transform is None else transform(name, tensor)
