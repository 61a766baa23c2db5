"""Gather whole arrays in process 0, one at a time, from the parts in all processes.

Process 0 says which array it wants next, and all processes gather it: for a moment every device
holds one whole array, never two. If process 0 raises an error, every process raises it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils

from ema.errors import CheckpointError, EMAError, ModelError

__all__ = ["Whole", "is_everywhere", "is_here", "on_first_process"]

Whole = Callable[[Any], Any]
"""A function from an array to the whole array in this process."""

_DONE = -1


def is_here(leaf: Any) -> bool:
    """Whether this process has every element; other processes may have copies."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def is_everywhere(leaf: Any) -> bool:
    """Whether every process has a part of the array, so that all can take part in gathering it."""
    holders: set[int] = {device.process_index for device in leaf.sharding.device_set}
    return bool(len(holders) == jax.process_count())


def on_first_process(leaves: Sequence[Any], work: Callable[[Whole], Path]) -> Path:
    """Run ``work`` in process 0, with a function that gathers any of ``leaves``.

    If this process alone holds all leaves, ``work`` runs here without communication. Otherwise
    every process must call this function, with the same arrays.

    Args:
        leaves: arrays, in the same order in every process.
        work: may call the function for any leaf, in any order.

    Returns:
        The result of ``work`` in process 0, in every process.

    Raises:
        ModelError: the processes hold different arrays.
        CheckpointError: in every process but 0, if ``work`` failed in process 0.
        EMAError: in process 0, the error that ``work`` raised.
    """
    if all(not isinstance(leaf, jax.Array) or leaf.is_fully_addressable for leaf in leaves):
        return work(_here)
    shared = [leaf for leaf in leaves if not is_here(leaf)]
    _check_alike(shared)
    if jax.process_index():
        while (index := _agree(0)) != _DONE:
            multihost_utils.process_allgather(shared[index], tiled=True)
        path, error = json.loads(_tell(""))
        if error is not None:
            raise CheckpointError(error)
        return Path(path)

    index_of = {id(leaf): index for index, leaf in enumerate(shared)}

    def whole(leaf: Any) -> Any:
        if is_here(leaf):
            return _here(leaf)
        _agree(index_of[id(leaf)])
        return multihost_utils.process_allgather(leaf, tiled=True)

    outcome: tuple[str | None, str | None] = None, "process 0 was interrupted"
    try:
        path = work(whole)
        outcome = str(path), None
    except EMAError as error:
        outcome = None, str(error)
        raise
    finally:
        _agree(_DONE)
        _tell(json.dumps(outcome))
    return path


def _here(leaf: Any) -> Any:
    """The same elements in an array that only this process holds."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf.addressable_data(0)
    return leaf


def _check_alike(leaves: Sequence[jax.Array]) -> None:
    """Raise an error if the processes hold different arrays: they could not gather them."""
    text = json.dumps([(leaf.shape, str(leaf.dtype)) for leaf in leaves])
    ours = np.frombuffer(xxhash.xxh3_64_digest(text.encode()), np.uint32)
    if len(np.unique(multihost_utils.process_allgather(ours), axis=0)) > 1:
        raise ModelError("the processes hold different arrays: they cannot be gathered")


def _agree(index: int) -> int:
    """Receive a number from process 0, usually the index of the next array."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(index)))


def _tell(text: str) -> str:
    """Send a value from process 0 to every process."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = _agree(len(data))
    mine = data if len(data) == size else np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(mine)).decode()
