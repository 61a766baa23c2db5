"""Save and load, against the disk alone and for very many tensors."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file

from benchmarks.cases.peaks import of_process
from benchmarks.models import gpt2, size, vectors
from benchmarks.report import Report, Row
from benchmarks.setting import Setting, in_fresh_process
from benchmarks.timing import Case, Contender, Effort, measure
from ema.torch_backend import EMAModel

TENSORS = {"full": 200_000, "quick": 50_000, "tiny": 64}
ELEMENTS = 64
ROUNDS = {"full": 3, "quick": 3, "tiny": 1}
PEERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "torch.save": (torch.save, torch.load),
    "safetensors": (save_file, load_file),
}


def save(setting: Setting) -> Case:
    """The limit is to write the same bytes at once and wait for the disk."""
    model = gpt2(setting)
    average, folder = EMAModel(model), _folder()
    content = average.save(folder / "first").read_bytes()

    def pickled() -> None:
        torch.save(average.state_dict(), folder / "state.pt")
        _flush(folder / "state.pt")

    def write() -> None:
        # beside the old file, as a save must: its pages of the cache cannot be used again
        (folder / "new").write_bytes(content)
        _flush(folder / "new")
        (folder / "new").replace(folder / "raw")

    return Case(
        title=f"save: GPT-2, {size(model)}",
        contenders=[
            Contender("ema", lambda: average.save(folder / "ours"), kind="ours"),
            Contender("torch.save and fsync", pickled),
            Contender("write and fsync", write, kind="limit"),
        ],
        references=["write and fsync"],
        note="Bar: ema at most 1.5 of the disk.",
    )


def load(setting: Setting) -> Case:
    """The limit is to read the same bytes at once and digest them."""
    model = gpt2(setting)
    average, folder = EMAModel(model), _folder()
    file, pickled = average.save(folder), folder / "state.pt"
    torch.save(average.state_dict(), pickled)

    def read() -> None:
        xxhash.xxh3_128_hexdigest(file.read_bytes())

    return Case(
        title=f"load: GPT-2, {size(model)}",
        contenders=[
            Contender("ema", lambda: average.load(folder), kind="ours"),
            Contender(
                "torch.load, no digest",
                lambda: average.load_state_dict(torch.load(pickled)),
            ),
            Contender("read and digest", read, kind="limit"),
        ],
        references=["read and digest"],
        note="Bar: ema at most 1.5 of the disk and the digest.",
    )


def many_in_a_file(setting: Setting) -> Report:
    """Ours for a quarter, half and all of the tensors, the others for all.

    A mixture of experts has 200,000 tensors. The time of one tensor should not grow with their number.
    """
    number = TENSORS[setting.size]
    rows = []
    for name, tensors in [
        *(("ema", number // part) for part in (4, 2, 1)),
        *((peer, number) for peer in PEERS),
    ]:
        saved, loaded, peak = in_fresh_process(figures, name, tensors, setting)
        cells = [f"{tensors:,}"]
        for seconds in (saved, loaded):
            cells += [f"{seconds:.2f}", f"{seconds / tensors * 1e6:.1f}"]
        cells += [f"{peak / 2**20:.0f}", f"{peak / (tensors * 4 * ELEMENTS):.2f}"]
        rows.append(Row(name=name, kind="ours" if name == "ema" else "peer", cells=cells))
    each = "µs a tensor"
    return Report(
        title=f"save and load {number:,} tensors of {ELEMENTS} float32",
        columns=["tensors", "save, s", each, "load, s", each, "peak, MiB", "÷ tensors"],
        rows=rows,
        note="Bar: the microseconds of a tensor stay, whatever their number.",
        rounds=ROUNDS[setting.size],
    )


def figures(name: str, tensors: int, setting: Setting) -> tuple[float, float, int]:
    """Seconds of a save and a load, and the peak of bytes beyond the average, in this process."""
    for contender in _contenders(name, 16, setting):  # code that is loaded by the first use
        contender.call()
    contenders = _contenders(name, tensors, setting)
    memory = of_process()
    memory.reset()
    before = memory.now()
    contenders[0].call()  # a save before the first load
    seconds = measure(contenders, Effort(rounds=ROUNDS[setting.size]))
    saved, loaded = (statistics.median(seconds[c.name]) for c in contenders)
    return saved, loaded, memory.peak() - before


def _contenders(name: str, tensors: int, setting: Setting) -> list[Contender]:
    """How ``name`` saves, flushed to the disk, and loads into what is there."""
    model = vectors(tensors * ELEMENTS, setting, tensors=tensors)
    average, folder = EMAModel(model), _folder()
    if name == "ema":
        save, load = (lambda: average.save(folder)), (lambda: average.load(folder))
    else:
        file, (write, read) = folder / "state", PEERS[name]

        def save() -> None:
            write(average.averaged_state_dict(), file)
            _flush(file)

        def load() -> None:
            state = read(file)
            for key, tensor in average.averaged_parameters().items():
                tensor.copy_(state[key])

    return [Contender("save", save), Contender("load", load)]


def _flush(file: Path) -> None:
    """Wait for the disk; else the file would be written while another contender is timed."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _folder() -> Path:
    """A folder in the current one, whose disk is measured, until the process ends.

    A worker of ``multiprocessing`` leaves without ``atexit``.
    """
    folder = Path(tempfile.mkdtemp(prefix="ema-bench-", dir=Path.cwd()))
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=0)
    return folder
