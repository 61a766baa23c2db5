"""Save and load states of very many small tensors: seconds, and the memory beyond the average.

A mixture of experts has 200,000 tensors. Each row is measured in a process of its own; the times are
medians, those of a tensor should not grow with their number.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.memory import of_process
from benchmarks.models import split
from benchmarks.process import in_fresh_process
from benchmarks.report import Report, Row
from benchmarks.setting import Setting
from ema.torch_backend import EMAModel

__all__ = ["MANY_IN_A_FILE", "Figures", "figures", "measure_many"]

MANY_IN_A_FILE = "many-in-a-file"
TENSORS = {"full": 200_000, "quick": 50_000, "tiny": 64}
ELEMENTS = 64
ROUNDS = 3
COLUMNS = ["tensors", "save, s", "µs a tensor", "load, s", "µs a tensor", "peak, MiB", "÷ tensors"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Seconds of a save and a load, and the most bytes beyond the average in either."""

    save: float
    load: float
    peak: int


def measure_many(setting: Setting) -> Report:
    """Ours for a quarter, half and all of the tensors, the others for all."""
    number = TENSORS[setting.size]
    cases = [("ema", number // 4), ("ema", number // 2), ("ema", number)]
    cases += [("torch.save", number), ("safetensors", number)]
    rows = []
    for name, tensors in cases:
        found = in_fresh_process(figures, name, tensors, setting)
        cells = [
            f"{tensors:,}",
            *(f"{found.save:.2f}", f"{found.save / tensors * 1e6:.1f}"),
            *(f"{found.load:.2f}", f"{found.load / tensors * 1e6:.1f}"),
            *(f"{found.peak / 2**20:.0f}", f"{found.peak / (tensors * 4 * ELEMENTS):.2f}"),
        ]
        rows.append(Row(name=name, kind="ours" if name == "ema" else "peer", cells=cells))
    return Report(
        title=f"save and load {number:,} tensors of {ELEMENTS} float32",
        columns=COLUMNS,
        rows=rows,
        note="Bar: the microseconds of a tensor stay, whatever their number.",
        rounds=ROUNDS if setting.size != "tiny" else 1,
    )


def figures(name: str, tensors: int, setting: Setting) -> Figures:
    """Measure this process; nothing else should have run in it."""
    small = _calls(name, 16, setting)
    for call in small:  # code that is loaded by the first use
        call()
    save, load = _calls(name, tensors, setting)
    memory = of_process()
    seconds: dict[Callable[[], None], list[float]] = {save: [], load: []}
    memory.reset()
    before = memory.now()
    for _ in range(ROUNDS if setting.size != "tiny" else 1):
        for call, times in seconds.items():
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
    return Figures(
        save=statistics.median(seconds[save]),
        load=statistics.median(seconds[load]),
        peak=memory.peak() - before,
    )


def _calls(name: str, tensors: int, setting: Setting) -> tuple[Callable[[], None], ...]:
    """How ``name`` saves, flushed to the disk, and loads into what is there."""
    model = split(tensors * ELEMENTS, tensors, setting)
    average, folder = EMAModel(model), Path(tempfile.mkdtemp(prefix="ema-bench-", dir=Path.cwd()))
    file = folder / "state"

    def save() -> None:
        if name == "ema":
            average.save(folder)
            return
        state = average.averaged_state_dict()
        if name == "safetensors":
            save_file(state, file)
        else:
            torch.save(state, file)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())

    def load() -> None:
        if name == "ema":
            average.load(folder)
            return
        state = load_file(file) if name == "safetensors" else torch.load(file)
        for key, tensor in average.averaged_parameters().items():
            tensor.copy_(state[key])

    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=0)
    return save, load
