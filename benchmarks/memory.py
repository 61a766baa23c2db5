"""How much memory an update and a swap take at their peak, beyond the model and the average.

Each contender works in a process of its own, and what counts is the high-water mark of that process
(``VmHWM``, which Linux resets on request), or that of CUDA's allocator on an accelerator.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import count, gpt2, size
from benchmarks.process import in_fresh_process
from benchmarks.report import Report, Row
from benchmarks.setting import Setting

__all__ = ["MEMORY", "Peaks", "measure_memory", "of_process", "peaks"]

MEMORY = ("memory-update", "memory-swap")
FLOAT32 = 4
STATUS = Path("/proc/self/status")
COLUMNS = [
    "made and used once: bytes a parameter",
    "held",
    "peak in use",
    "peak in use, MiB",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """Bytes beyond the model and a float32 average.

    Attributes:
        title: what was done.
        parameters: of the model.
        made: the most while the average is made and used for the first time.
        held: what it keeps after that.
        used: the most while it is used again.
    """

    title: str
    parameters: int
    made: int
    held: int
    used: int


def measure_memory(name: str, setting: Setting) -> Report:
    """One contender after the other."""
    found = {
        contender: in_fresh_process(peaks, name, contender, setting)
        for contender in in_fresh_process(contenders, name)
    }
    rows = []
    for contender, p in found.items():
        each = [f"{n / p.parameters:.2f}" for n in (p.made, p.held, p.used)]
        cells = [*each, f"{p.used / 2**20:.0f}"]
        kind = "ours" if contender in ("ema", "ema assign") else "peer"
        rows.append(Row(name=contender, kind=kind, cells=cells))
    note = "Bar: ema at most 16 MiB." if name == "memory-swap" else "Bar: 0 for ema."
    return Report(title=found["ema"].title, columns=COLUMNS, rows=rows, note=note)


def contenders(name: str) -> list[str]:
    """Whose memory can be measured; asked for where the peers are imported anyway."""
    return [*_makers(name)]


def peaks(name: str, contender: str, setting: Setting) -> Peaks:
    """Measure this process; nothing else should have run in it."""
    make = _makers(name)[contender]
    tiny = make(gpt2(dataclasses.replace(setting, size="tiny")))
    for _ in range(3):  # code and threads that come with the first use
        tiny()
    del tiny
    model = gpt2(setting, copies=4)
    memory = of_process() if setting.on_cpu else _of_cuda()
    memory.reset()
    parameters = count(model)
    start = memory.now() + FLOAT32 * parameters
    call = make(model)
    call()
    call()  # the first update of some is a copy
    made = memory.peak() - start
    memory.reset()
    held = memory.now() - start
    for _ in range(3):
        call()
    used = memory.peak() - start
    what = "an update" if name == "memory-update" else "a swap in and out"
    return Peaks(
        title=f"memory of {what} beyond the model and a float32 average: GPT-2, {size(model)}",
        parameters=parameters,
        made=made,
        held=held,
        used=used,
    )


def _makers(name: str) -> dict[str, Callable[[nn.Module], Callable[[], object]]]:
    from benchmarks.peers import PEERS, SWAPS, ours

    if name == "memory-swap":
        return dict(SWAPS)
    return {"ema": lambda model: ours(model).call} | {
        peer: lambda model, make=make: make(model, None) for peer, make in PEERS.items()
    }


@dataclasses.dataclass(frozen=True)
class Memory:
    """Three questions to an allocator, in bytes."""

    now: Callable[[], int]
    peak: Callable[[], int]
    reset: Callable[[], Any]


def _of_cuda() -> Memory:
    return Memory(
        torch.cuda.memory_allocated,
        torch.cuda.max_memory_allocated,
        torch.cuda.reset_peak_memory_stats,
    )


def of_process() -> Memory:
    if not STATUS.exists():
        raise OSError(f"the peak of a process can be reset on Linux only, not on {sys.platform}")

    def field(name: str) -> int:
        (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith(name))
        return 1024 * int(line.split()[1])

    def reset() -> None:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # what was freed before must not serve what is measured now
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    return Memory(lambda: field("VmRSS"), lambda: field("VmHWM"), reset)
