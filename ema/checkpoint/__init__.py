"""The file of an average: ``ema.safetensors``, the same from both backends.

:func:`write_state` replaces a state by another one in a single step, :func:`read_state` checks it
whole; both know tensors as a dtype, a shape and bytes, and no framework. Plain safetensors readers
see the averages under the names of the model. The format is described in ``docs/checkpoints.md``.
"""

from __future__ import annotations

from ema.checkpoint.reader import StoredState, StoredTensor, open_state, read_state
from ema.checkpoint.record import FORMAT_VERSION, Record
from ema.checkpoint.writer import MAX_SHARD_SIZE, Source, write_state, write_tensors

__all__ = [
    "FORMAT_VERSION",
    "MAX_SHARD_SIZE",
    "Record",
    "Source",
    "StoredState",
    "StoredTensor",
    "open_state",
    "read_state",
    "write_state",
    "write_tensors",
]
