"""Arrays of a checkpoint that are not read yet: their dtype, their shape, and how to read them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ema.checkpoint import Source
from ema.errors import CheckpointError, shortened

__all__ = ["DTYPES", "Bound", "Leaf", "Unread", "is_leaf", "is_stored_array"]

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "complex128": "C128",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The safetensors name of each dtype, by NumPy's name."""

_SMALLEST_BOUND = 1 << 30
_USUAL_RATIO = 100
"""How many times larger than the source its averages may be, unless the user sets ``max_bytes``."""

_COUNTERS = {"int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"}


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """An array that can be read.

    Attributes:
        dtype: NumPy's name of its dtype, a key of ``DTYPES``.
        shape: its shape.
        read: returns its elements as contiguous bytes, in native byte order and row-major order.
        planned: called before any tensor is read, if this one will be, with a key that sorts tensors in
            the order in which they are read.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Any]
    planned: Callable[[tuple[int, str]], None] | None = None

    @property
    def is_average(self) -> bool:
        """Whether the elements are real or complex floating point."""
        return self.dtype.startswith(("float", "bfloat", "complex"))

    @property
    def itemsize(self) -> int:
        """Bytes of one element, also for dtypes that NumPy lacks."""
        if self.dtype.startswith("float8"):
            return 1
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.itemsize * math.prod(self.shape)

    def source(self, name: str) -> Source:
        """The leaf as a tensor for the writer. Announces that it will be read."""
        if self.planned is not None:
            self.planned((-self.itemsize, name))  # the writer's order
        return Source(DTYPES[self.dtype], self.shape, self.read)

    def number(self, name: str) -> int:
        """Read the count that the leaf holds.

        Raises:
            CheckpointError: it does not hold one integer.
        """
        if self.shape not in {(), (1,)} or self.dtype not in _COUNTERS:
            several = ": jax.vmap and jax.pmap make several counts; save one member alone"
            raise CheckpointError(
                f"`{shortened(name)}` must be a count, got {self.dtype}{list(self.shape)}"
                + (several if self.shape not in {(), (1,)} else "")
            )
        return int(np.frombuffer(self.read(), self.dtype)[0])


@dataclasses.dataclass(frozen=True)
class Unread:
    """An array that cannot be read.

    Attributes:
        reason: why; an error puts it after the name: ``"is an array of objects, which …"``.
    """

    reason: str


def is_leaf(node: Any) -> bool:
    """Whether the node is an array that can be read."""
    return isinstance(node, Leaf)


def is_stored_array(node: Any) -> bool:
    """Whether the node is an array, readable or not."""
    return isinstance(node, Leaf | Unread)


class Bound:
    """Limits the bytes that the averages of a compressed source may take.

    Args:
        size: bytes of the source.
        max_bytes: the limit. By default 1 GiB or, if larger, 100 times the source.
    """

    def __init__(self, size: int, max_bytes: int | None) -> None:
        self._size = size
        self._most = max(_SMALLEST_BOUND, _USUAL_RATIO * size) if max_bytes is None else max_bytes
        self._total = 0

    def add(self, nbytes: int, _order: tuple[int, str]) -> None:
        """Add an average that will be read.

        Raises:
            CheckpointError: the averages exceed the limit.
        """
        self._total += nbytes
        if self._total > self._most:
            raise CheckpointError(
                f"its {self._size} bytes declare averages of {self._total} bytes or more, {self._most}"
                " are allowed: max_bytes= (--max-bytes) allows more"
            )
