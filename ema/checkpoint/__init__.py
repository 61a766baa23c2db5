"""Write and read ``ema.safetensors``, the file of an average. Both backends share this format.

:func:`write_state` replaces a saved state atomically. :func:`read_state` opens a state and checks all
of it. Neither needs a framework: a tensor is a dtype, a shape and bytes. Any safetensors reader sees
the averages under the model's own names. ``docs/checkpoints.md`` describes the format.
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
