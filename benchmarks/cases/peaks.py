"""The peak of the memory of an update and of a swap, beyond the model and the average.

Each contender works in a process of its own. The peak is the high-water mark of that process (``VmHWM``,
which Linux resets on request), or that of CUDA's allocator on an accelerator.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.models import count, gpt2, size
from benchmarks.peers import SWAPS, UPDATES, kind, swap_of, update_of
from benchmarks.report import Report, Row
from benchmarks.setting import Setting, in_fresh_process

FLOAT32 = 4
STATUS = Path("/proc/self/status")
COLUMNS = ["made and used once: bytes a parameter", "held", "peak in use", "peak in use, MiB"]

Make = Callable[[str, nn.Module], Callable[[], object]]


def of_updates(setting: Setting) -> Report:
    """The memory of an update."""
    return _report("an update", UPDATES, update_of, "Bar: 0 for ema.", setting)


def of_swaps(setting: Setting) -> Report:
    """The memory of a swap."""
    return _report("a swap in and out", SWAPS, swap_of, "Bar: ema at most 16 MiB.", setting)


def _report(work: str, names: list[str], make: Make, note: str, setting: Setting) -> Report:
    rows = []
    for name in names:
        model, parameters, peaks = in_fresh_process(peaks_of, make, name, setting)
        cells = [f"{peak / parameters:.2f}" for peak in peaks] + [f"{peaks[-1] / 2**20:.0f}"]
        rows.append(Row(name=name, kind=kind(name), cells=cells))
    title = f"memory of {work} beyond the model and a float32 average: GPT-2, {model}"
    return Report(title=title, columns=COLUMNS, rows=rows, note=note)


def peaks_of(make: Make, name: str, setting: Setting) -> tuple[str, int, list[int]]:
    """Measure this process, in which nothing else has run.

    Returns:
        The size of the model, its parameters, and the bytes beyond it and a float32 average: the peak
        while the average is made and used for the first time, what it holds after that, and the peak
        while it is used again.
    """
    tiny = make(name, gpt2(dataclasses.replace(setting, size="tiny")))
    for _ in range(3):  # code and threads that come with the first use
        tiny()
    del tiny
    model = gpt2(setting, copies=4)
    memory = of_process() if setting.on_cpu else of_cuda()
    memory.reset()
    start = memory.now() + FLOAT32 * count(model)
    call = make(name, model)
    call()
    call()  # the first update of some is a copy
    made = memory.peak() - start
    memory.reset()
    held = memory.now() - start
    for _ in range(3):
        call()
    used = memory.peak() - start
    return size(model), count(model), [made, held, used]


class Memory(NamedTuple):
    """Three questions to an allocator, in bytes."""

    now: Callable[[], int]
    peak: Callable[[], int]
    reset: Callable[[], Any]


def of_cuda() -> Memory:
    """The memory that PyTorch has given to tensors on the accelerator."""
    cuda = torch.cuda
    return Memory(cuda.memory_allocated, cuda.max_memory_allocated, cuda.reset_peak_memory_stats)


def of_process() -> Memory:
    """The memory of this process."""
    if not STATUS.exists():
        raise OSError(f"the peak of a process can be reset on Linux only, not on {sys.platform}")

    def field(name: str) -> int:
        (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith(name))
        return 1024 * int(line.split()[1])

    def reset() -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # freed memory must not serve what is measured now
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    return Memory(lambda: field("VmRSS"), lambda: field("VmHWM"), reset)
