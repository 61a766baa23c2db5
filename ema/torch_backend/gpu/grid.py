"""Split many flat tensors into blocks of one grid, so that a kernel processes all in one launch.

Each program of a kernel takes one block: a row of a table, which holds addresses, and a block
number. If a block is whole and begins at a multiple of 16 bytes in every tensor, a thread reads 16
bytes at once. The rest of each tensor, at its beginning and end, is read with a mask in a second
launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["BLOCK", "LOOK", "WARPS", "Launch", "launches"]

BLOCK = 2048
"""Elements that one program works on, with :data:`WARPS` warps.

Measured on an H100 with ``python -m benchmarks --cases kernels``: for every kernel that writes,
this size is the best or within 1 % of the best.
"""
LOOK = 4096
"""The same for a kernel that only reads: with :data:`BLOCK`, too few reads would be in flight."""
WARPS = 8
_ALIGNED = 16
"""Bytes that a thread loads at once."""


class Launch(NamedTuple):
    """Blocks that a kernel takes in one launch.

    Attributes:
        table: int64. The row of each tensor holds addresses, the number of elements, and further
            values that the kernel needs.
        blocks: int32. The row of each program holds the tensor's row in the table and the number
            of the block in that tensor.
        whole: whether the blocks are whole and aligned.
        block: elements of a block.
    """

    table: Tensor
    blocks: Tensor
    whole: bool
    block: int

    @property
    def grid(self) -> tuple[int]:
        """The number of programs: one for each block."""
        return (len(self.blocks),)


def launches(
    rows: Sequence[tuple[int, ...]] | npt.NDArray[np.int64],
    sizes: Sequence[int],
    device: torch.device,
    *,
    block: int = BLOCK,
    places: bool = False,
) -> Iterator[Launch]:
    """Launches for tensors of the same dtypes: at most one for whole blocks and one for the rest.

    Args:
        rows: one row for each tensor, or for several tensors of the same length that are processed
            together: the address of each, the number of elements, and further columns.
        sizes: bytes of an element, one for each address.
        device: the device of the tensors.
        block: elements of a block.
        places: whether the last column is the position of the first element, which must grow
            (modulo 2³²) if a row begins at a later element.
    """
    if len(rows) == 0:
        return
    table = _peeled(
        np.array(rows, dtype=np.int64), np.array(sizes, dtype=np.int64), block, places=places
    )
    pointers, number = table[:, : len(sizes)], table[:, len(sizes)]
    aligned = (pointers % _ALIGNED == 0).all(axis=1)
    whole = np.where(aligned, number // block, 0)
    rest = -(-number // block) - whole
    on_device = torch.from_numpy(table).to(device)
    for first, count, is_whole in ((np.zeros_like(whole), whole, True), (whole, rest, False)):
        if total := int(count.sum()):
            yield Launch(on_device, _blocks(first, count, total, device), is_whole, block)


def _blocks(
    first: npt.NDArray[np.int64], count: npt.NDArray[np.int64], total: int, device: torch.device
) -> Tensor:
    """Rows and block numbers: for each row, ``count`` blocks that begin at ``first``.

    They are computed on the device, because a large model has hundreds of thousands of blocks, too
    many to copy from the host.
    """
    begins, counts = torch.from_numpy(np.stack([count.cumsum() - count - first, count])).to(device)
    rows = torch.arange(len(count), device=device)
    row = torch.repeat_interleave(rows, counts, output_size=total)
    block = torch.arange(total, device=device) - begins[row]
    return torch.stack([row, block], dim=1).to(torch.int32)


def _peeled(
    table: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], block: int, *, places: bool
) -> npt.NDArray[np.int64]:
    """Split rows in two, so that all addresses of the second part are aligned.

    The first part has only the few elements before. A row stays whole if its addresses are never
    aligned at the same element, or if no whole block would follow.
    """
    columns = len(sizes)
    first = np.zeros(len(table), dtype=np.int64)
    found = np.zeros(len(table), dtype=bool)
    for elements in range(_ALIGNED // int(sizes.min())):
        aligned = ((table[:, :columns] + elements * sizes) % _ALIGNED == 0).all(axis=1)
        first[aligned & ~found] = elements
        found |= aligned
    peeled = (first > 0) & (table[:, columns] - first >= block)
    if not peeled.any():
        return table
    rest, begins = table.copy(), table[peeled]
    first = np.where(peeled, first, 0)
    rest[:, :columns] += first[:, None] * sizes
    rest[:, columns] -= first
    if places:
        rest[:, -1] = (rest[:, -1] + first) % (1 << 32)
    begins[:, columns] = first[peeled]
    return np.concatenate([rest, begins])
