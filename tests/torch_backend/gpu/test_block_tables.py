"""Blocks of many tensors: each element once, and 16 bytes at a time where that is allowed."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ema.torch_backend.gpu.grid import BLOCK, launches
from tests import processes

CPU = torch.device("cpu")
ROW = st.tuples(
    st.integers(0, 7), st.integers(0, 7), st.integers(0, 3 * BLOCK + 9), st.integers(0, 1 << 32)
)


def covered(found, sizes):
    """The elements that the blocks of each launch take: addresses, and the place of the first."""
    for launch in found:
        table = launch.table.tolist()
        for row, block in launch.blocks.tolist():
            *pointers, number, place = table[row]
            start = block * BLOCK
            stop = min(start + BLOCK, number)
            assert start < stop
            begin = [p + start * size for p, size in zip(pointers, sizes, strict=True)]
            yield launch.whole, begin, stop - start, (place + start) % (1 << 32)


@given(st.lists(ROW, max_size=4), st.sampled_from([(4, 4), (4, 2), (2, 2), (8, 8)]))
def test_every_element_is_in_one_block(rows, sizes):
    """Two tensors a row, far from those of other rows, at odd places."""
    given_rows = [
        ((2 * i + 1) << 40 | a * sizes[0], (2 * i + 2) << 40 | b * sizes[1], n, p)
        for i, (a, b, n, p) in enumerate(rows)
    ]
    seen: dict[int, list[tuple[int, int]]] = {}
    for whole, begin, number, place in covered(
        launches(given_rows, sizes, CPU, places=True), sizes
    ):
        index = (begin[0] >> 41) if sizes else 0
        first, second, _, counted = given_rows[index]
        element = (begin[0] - first) // sizes[0]
        assert begin[0] == first + element * sizes[0]
        assert begin[1] == second + element * sizes[1]
        assert place == (counted + element) % (1 << 32)
        if whole:
            assert number == BLOCK
            assert all(address % 16 == 0 for address in begin)
        seen.setdefault(index, []).append((element, number))
    for index, (*_, number, _) in enumerate(given_rows):
        reached = 0
        for element, count in sorted(seen.get(index, [])):
            assert element == reached
            reached += count
        assert reached == number


@pytest.mark.parametrize(
    ("sizes", "offsets", "masked"),
    [
        ((4, 4), (0, 0), 1),
        ((4, 4), (3, 3), 2),
        ((4, 4), (1, 2), 101),  # never aligned at the same element
        ((4, 2), (3, 3), 2),
        ((4, 2), (1, 0), 101),
        ((4, 2, 4), (5, 5, 5), 2),
        ((2, 2), (7, 7), 2),
    ],
)
def test_only_the_edges_are_masked_where_a_prefix_can_be_peeled(sizes, offsets, masked):
    """A flat buffer at an odd offset, 100 blocks and a half."""
    addresses = [
        ((index + 1) << 20) + offset * size
        for index, (size, offset) in enumerate(zip(sizes, offsets, strict=True))
    ]
    found = list(launches([(*addresses, 100 * BLOCK + BLOCK // 2)], sizes, CPU))
    blocks = {launch.whole: len(launch.blocks) for launch in found}
    assert blocks[False] == masked
    assert blocks.get(True, 0) >= 100 if masked < 3 else True not in blocks


def test_nothing_is_launched_for_nothing():
    assert list(launches([], (4,), CPU)) == []
    assert list(launches([(16, 0)], (4,), CPU)) == []


def test_tables_are_on_the_device_that_is_asked_for():
    """Whatever the default device is."""
    code = """
import torch
torch.set_default_device("meta")
from ema.torch_backend.gpu import kernels
from ema.torch_backend.gpu.grid import launches
(launch,) = launches([(16, 5)], (4,), torch.device("cpu"))
assert launch.table.tolist() == [[16, 5]], launch
assert launch.blocks.device.type == "cpu"
one = torch.ones(5000, device="cpu")
for kernel in (kernels.Fused([one], [one]), kernels.Look([one]), kernels.Exchange([one], [one])):
    assert {tensor.device.type for tensor in kernel.tensors} == {"cpu"}
"""
    processes.run([sys.executable, "-c", code])
