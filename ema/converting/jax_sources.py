"""Orbax folders, and ``nnx.EMA``: read as they were saved, without the model or the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ema.checkpoint import Source
from ema.converting.found import Found, whole
from ema.errors import ArgumentError, CheckpointError
from ema.extras import require
from ema.jax_backend.files import source_of
from ema.jax_backend.selection import is_hole, is_inexact, named_leaves

__all__ = ["read_folder", "read_nnx"]


def read_folder(folder: Path, name: str | None) -> Found:
    """An Orbax checkpoint that holds the state of ``params_ema`` somewhere, or an ``nnx.EMA``."""
    require("orbax.checkpoint", "jax")
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(folder.absolute()).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            tree = checkpointer.restore(folder.absolute(), restore_args=as_numpy)
    except Exception as error:  # what a damaged checkpoint raises is not said anywhere
        raise CheckpointError(f"Orbax cannot read it: {error!r:.300}") from None
    states = list(_states(tree))
    if not states:
        return _read_nnx_tree(tree)
    averages = [(label, state) for state in states for label in _labels(state)]
    chosen = [(label, state) for label, state in averages if name is None or label == name]
    labels = sorted({str(label) for label, _ in averages})
    if len({label for label, _ in chosen}) != 1:
        raise ArgumentError(f"`name` must choose one of the averages {', '.join(labels)}")
    tensors: dict[str, Source] = {}
    remainders: dict[str, Source] = {}
    not_averaged: list[str] = []
    for label, state in chosen:
        sources, holes = _sources(_of(label, state, "params_ema"))
        if twice := sources.keys() & tensors.keys():
            raise CheckpointError(f"it holds two averages of {sorted(twice)[0]!r}")
        tensors |= sources
        remainders |= _sources(_of(label, state, "remainder"))[0]
        not_averaged += holes
    return Found(
        kind="params_ema in Orbax",
        tensors=tensors,
        name=chosen[0][0],
        step=whole("step", chosen[0][1]["step"]),
        count=whole("count", chosen[0][1]["count"]),
        remainders=remainders,
        skipped=_skipped(chosen[0][1]),
        not_averaged=tuple(n for n in dict.fromkeys(not_averaged) if n not in tensors),
    )


def read_nnx(average: Any) -> Found:
    """An ``nnx.EMA``, which counts no steps and knows its decay as a number."""
    from flax import nnx

    tensors, _ = _sources(nnx.to_pure_dict(average.params))
    return Found(kind="nnx.EMA", tensors=tensors)


def _read_nnx_tree(tree: Any) -> Found:
    """``nnx.state(average)`` or its pure dict, of flax's ``nnx.EMA`` or of our ``EMA``."""
    if not isinstance(tree, Mapping) or "params" not in tree:
        raise CheckpointError("it holds neither the state of params_ema nor an nnx.EMA")
    tensors = _variables(tree, "params")
    if not {"step", "count"} <= tree.keys():
        return Found(kind="nnx.EMA in Orbax", tensors=tensors)
    counters: dict[str, Any] = {
        name: whole(name, jax.tree.leaves(tree[name])[0])  # a pure dict has no level of `value`
        for name in ("step", "count", "skipped")
        if jax.tree.leaves(tree.get(name))
    }
    return Found(
        kind="EMA in Orbax",
        tensors={**tensors, **_variables(tree, "finer")},  # of which the model has rounded copies
        remainders=_variables(tree, "remainder"),
        **counters,
    )


def _variables(tree: Mapping[str, Any], field: str) -> dict[str, Source]:
    sources, _ = _sources(tree.get(field))
    return {name.removesuffix(".value"): source for name, source in sources.items()}


def _states(node: Any) -> Iterator[Mapping[str, Any]]:
    """Every part that has the fields of a ``ParamsEMAState``."""
    if isinstance(node, Mapping):
        if {"step", "count", "params_ema"} <= node.keys():
            yield node
            return
        children = list(node.values())
    else:
        children = list(node) if isinstance(node, list | tuple) else []
    for child in children:
        yield from _states(child)


def _labels(state: Mapping[str, Any]) -> list[str | None]:
    name = state.get("name")
    return list(name) if isinstance(name, Mapping) and name else [None]


def _of(label: str | None, state: Mapping[str, Any], field: str) -> Any:
    """What a state has for one of its averages."""
    tree = state.get(field)
    return tree[label] if tree and len(_labels(state)) > 1 else tree


def _skipped(state: Mapping[str, Any]) -> int | None:
    found = state.get("skipped")
    # without its option the field is a tree without leaves, in whichever form Orbax gives that back
    return whole("skipped", found) if jax.tree.leaves(found) else None


def _sources(tree: Any) -> tuple[dict[str, Source], list[str]]:
    """The averages of a tree by name, and the names of what is none."""
    names, leaves, _ = named_leaves(tree)
    found = {
        name: source_of(name, leaf)
        for name, leaf in zip(names, leaves, strict=True)
        if not is_hole(leaf) and is_inexact(leaf)
    }
    return found, [name for name in names if name not in found]
