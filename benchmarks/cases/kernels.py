"""The kernels for GPUs by elements and warps of a program, beside PyTorch's operators.

Every figure counts the bytes that the work has to move. *Odd* tensors begin one element after a multiple
of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.models import WEIGHT
from benchmarks.report import Report, Row
from benchmarks.setting import Setting
from ema.rounding import stream_of
from ema.torch_backend.gpu import grid, kernels

CONFIGURATIONS = [(2048, 8), (2048, 16), (1024, 4), (1024, 8), (4096, 8), (4096, 16), (512, 4)]
TENSORS = 128
ELEMENTS = {"full": 1 << 29, "quick": 1 << 26, "tiny": 1 << 12}


def kernels_of_sizes(setting: Setting) -> Report:
    """GB/s: a row for each kernel, a column for each size of a program."""
    elements = ELEMENTS[setting.size]
    empty = [""] * (len(CONFIGURATIONS) - 1)
    rows = [
        Row(name=name, kind="limit", cells=[bandwidth(call, bytes_ * elements), *empty])
        for name, call, bytes_ in operators(elements)
    ]
    cells: dict[str, list[str]] = {}
    for block, warps in CONFIGURATIONS:
        of_size = partial(grid.launches, block=block)
        with mock.patch.multiple(kernels, launches=of_size, LOOK=block, WARPS=warps):
            for name, call, bytes_ in works(elements):
                cells.setdefault(name, []).append(bandwidth(call, bytes_ * elements))
    rows += [Row(name=name, kind="ours", cells=each) for name, each in cells.items()]
    columns = [f"{block}/{warps}" for block, warps in CONFIGURATIONS]
    title = f"GB/s of kernels by elements/warps of a program: {elements:,} elements"
    return Report(title=title, columns=columns, rows=rows)


def bandwidth(call: Callable[[], object], traffic: int) -> str:
    """The median GB/s of a call that moves so many bytes."""
    from triton.testing import do_bench

    milliseconds = do_bench(call, warmup=20, rep=100, return_mode="median")
    return f"{traffic / milliseconds / 1e6:.0f}"


Work = tuple[str, Callable[[], object], int]
"""A name, a call, and the bytes that it moves for each element."""


def operators(elements: int) -> Iterator[Work]:
    """PyTorch's own."""
    one, other = (torch.randn(elements, device="cuda") for _ in range(2))
    ones, others = (list(tensor.tensor_split(TENSORS)) for tensor in (one, other))
    yield "copy_", lambda: one.copy_(other), 8
    yield "lerp_", lambda: one.lerp_(other, WEIGHT), 12
    yield "_foreach_lerp_", lambda: torch._foreach_lerp_(ones, others, WEIGHT), 12


def works(elements: int) -> Iterator[Work]:
    """The works of the kernels."""

    def tensors(dtype: torch.dtype, first: int = 0) -> list[Tensor]:
        whole = torch.randn(elements, device="cuda").to(dtype)
        return [tensor[first:] for tensor in whole.tensor_split(TENSORS)]

    def update(*of: Any) -> Callable[[], object]:
        return partial(kernels.Fused(*of), WEIGHT, 5)

    single, half = torch.float32, torch.bfloat16
    average, params, narrow, narrow_average = map(tensors, (single, single, half, half))
    remainders = [torch.zeros_like(tensor) for tensor in average]
    streams = [stream_of(str(index), 0) for index in range(TENSORS)]
    yield "float32", update(average, params), 12
    yield "float32 of bf16", update(average, narrow), 10
    yield "compensated", update(average, params, remainders), 20
    yield "compensated of bf16", update(average, narrow, remainders), 18
    yield "bf16 by chance", update(narrow_average, narrow, None, streams), 6
    yield "bf16 to nearest", update(narrow_average, narrow), 6
    yield "odd float32", update(tensors(single, 1), tensors(single, 1)), 12
    yield "odd float32 of bf16", update(tensors(single, 1), tensors(half, 1)), 10
    yield "look at float32", kernels.Look(params), 4
    yield "look at bf16", kernels.Look(narrow), 2
    exchange = kernels.Exchange(average, params).launches()
    yield "exchange", lambda: [launch() for launch in exchange], 16
