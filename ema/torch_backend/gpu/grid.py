"""Many flat tensors as blocks of one grid, so that a kernel goes through all of them in one launch.

A kernel's program takes one block: a row of a table, which holds addresses, and a number. A thread
reads 16 bytes at once where a block is whole and begins at a multiple of 16 in every tensor. The
rest of each tensor, at its begin and at its end, is read under a mask, in a launch of its own.
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

Measured on an H100 by ``python -m benchmarks --cases kernels``: the best for every kernel that writes, or
within 1 %.
"""
LOOK = 4096
"""The same for a kernel that only reads: 16 bytes of bfloat16 a thread are too few in flight."""
WARPS = 8
_ALIGNED = 16
"""Bytes of one load of a thread."""


class Launch(NamedTuple):
    """Blocks that a kernel takes in one launch.

    Attributes:
        table: int64, a row for each tensor: addresses, the number of elements, and what the kernel
            needs besides.
        blocks: int32, a row for each program: a row of the table, and which block of that.
        whole: whether the blocks are whole and aligned.
        block: elements of a block.
    """

    table: Tensor
    blocks: Tensor
    whole: bool
    block: int

    @property
    def grid(self) -> tuple[int]:
        """As many programs as there are blocks."""
        return (len(self.blocks),)


def launches(
    rows: Sequence[tuple[int, ...]] | npt.NDArray[np.int64],
    sizes: Sequence[int],
    device: torch.device,
    *,
    block: int = BLOCK,
    places: bool = False,
) -> Iterator[Launch]:
    """The launches for tensors of the same dtypes: at most one of whole blocks and one of others.

    Args:
        rows: for each tensor, or several of one length that are worked on together, the address of
            each, the number of elements, and further columns.
        sizes: bytes of an element, one for each address.
        device: of the tensors.
        block: elements of a block.
        places: whether the last column counts elements, and so grows with them (modulo 2³²).
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
    """Rows and numbers of blocks: from ``first``, ``count`` of each row; made on the device.

    There are hundreds of thousands for a large model: too many to bring them there.
    """
    begins, counts = torch.from_numpy(np.stack([count.cumsum() - count - first, count])).to(device)
    rows = torch.arange(len(count), device=device)
    row = torch.repeat_interleave(rows, counts, output_size=total)
    block = torch.arange(total, device=device) - begins[row]
    return torch.stack([row, block], dim=1).to(torch.int32)


def _peeled(
    table: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], block: int, *, places: bool
) -> npt.NDArray[np.int64]:
    """The first elements as rows of their own, where after them all addresses are aligned.

    Where the addresses never are at the same element, or no whole block would follow, a row stays.
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
