"""The GPU's kernels by elements and warps of a program, beside PyTorch's operators: GB/s.

    python -m benchmarks.kernels

Every figure counts the bytes that the work has to move. *Odd* tensors begin one element after a
multiple of 16 bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import machine
from ema.rounding import stream_of
from ema.torch_backend.gpu import grid as blocks
from ema.torch_backend.gpu import kernels

CONFIGURATIONS = [(2048, 8), (2048, 16), (1024, 4), (1024, 8), (4096, 8), (4096, 16), (512, 4)]
TENSORS = 128
WEIGHT = 0.001


def bandwidth(call: Callable[[], object], traffic: int) -> str:
    """GB/s of a call that moves so many bytes; the median."""
    from triton.testing import do_bench

    milliseconds = do_bench(call, warmup=20, rep=100, return_mode="median")
    return f"{traffic / milliseconds / 1e6:.0f}"


def operators(elements: int) -> Iterator[tuple[str, str]]:
    """PyTorch's own."""
    one, other = (torch.randn(elements, device="cuda") for _ in range(2))
    ones, others = (list(tensor.tensor_split(TENSORS)) for tensor in (one, other))
    yield "copy_", bandwidth(lambda: one.copy_(other), 8 * elements)
    yield "lerp_", bandwidth(lambda: one.lerp_(other, WEIGHT), 12 * elements)
    foreach = bandwidth(lambda: torch._foreach_lerp_(ones, others, WEIGHT), 12 * elements)
    yield "_foreach_lerp_", foreach


def works(elements: int) -> Iterator[tuple[str, Callable[[], object], int]]:
    """What the kernels do, and the bytes that each has to move."""

    def tensors(dtype: torch.dtype, first: int = 0) -> list[Tensor]:
        whole = torch.randn(elements, device="cuda").to(dtype)
        return [tensor[first:] for tensor in whole.tensor_split(TENSORS)]

    def update(*of: object) -> Callable[[], object]:
        fused = kernels.Fused(*of)  # type: ignore[arg-type]
        return lambda: fused(WEIGHT, 5)

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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--elements", type=int, default=1 << 29)
    arguments = parser.parse_args()
    console = Console(width=160)
    console.print("  ".join(f"{k} {v}" for k, v in machine("cuda").items()), style="dim")
    for name, figure in operators(arguments.elements):
        console.print(f"{name} {figure} GB/s")
    table = Table("GB/s", *(f"{block}/{warps}" for block, warps in CONFIGURATIONS))
    rows: dict[str, list[str]] = {}
    for block, warps in CONFIGURATIONS:
        of_size = partial(blocks.launches, block=block)
        with mock.patch.multiple(kernels, launches=of_size, LOOK=block, WARPS=warps):
            for name, call, each in works(arguments.elements):
                rows.setdefault(name, []).append(bandwidth(call, each * arguments.elements))
    for name, figures in rows.items():
        table.add_row(name, *figures)
    console.print(table)


if __name__ == "__main__":
    main()
