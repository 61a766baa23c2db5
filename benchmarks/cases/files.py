"""Save and load, against the disk alone and for very many tensors."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path

import torch
import xxhash
from safetensors.torch import load_file, save_file

from benchmarks.cases.peaks import of_process
from benchmarks.models import gpt2, size, split
from benchmarks.report import Report, Row
from benchmarks.setting import Setting, in_fresh_process
from benchmarks.timing import Case, Contender, Effort, measure
from ema.torch_backend import EMAModel

TENSORS = {"full": 200_000, "quick": 50_000, "tiny": 64}
ELEMENTS = 64
ROUNDS = 3


def save(setting: Setting) -> Case:
    """The limit is to write the same bytes at once and wait for the disk."""
    model = gpt2(setting)
    average, folder = EMAModel(model), _folder()
    content = memoryview(average.save(folder / "first").read_bytes())

    def pickled() -> None:
        with (folder / "state.pt").open("wb") as stream:
            torch.save(average.state_dict(), stream)
            stream.flush()
            os.fsync(stream.fileno())  # else it would be written while another is timed

    def write() -> None:
        # beside the old file, as a save must: its pages of the cache cannot be used again
        with (folder / "new").open("wb", buffering=0) as stream:
            rest = content
            while rest:
                rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
        (folder / "new").replace(folder / "raw")

    return Case(
        title=f"save: GPT-2, {size(model)}",
        contenders=[
            Contender(name="ema", call=lambda: average.save(folder / "ours"), kind="ours"),
            Contender(name="torch.save and fsync", call=pickled),
            Contender(name="write and fsync", call=write, kind="limit"),
        ],
        references=["write and fsync"],
        finish=setting.finish,
        note="Bar: ema at most 1.5 of the disk.",
    )


def load(setting: Setting) -> Case:
    """The limit is to read the same bytes at once and digest them."""
    model = gpt2(setting)
    average, folder = EMAModel(model), _folder()
    file = average.save(folder)
    torch.save(average.state_dict(), folder / "state.pt")

    def unpickle() -> None:
        average.load_state_dict(torch.load(folder / "state.pt"))

    def read() -> None:
        xxhash.xxh3_128_hexdigest(file.read_bytes())

    return Case(
        title=f"load: GPT-2, {size(model)}",
        contenders=[
            Contender(name="ema", call=lambda: average.load(folder), kind="ours"),
            Contender(name="torch.load, no digest", call=unpickle),
            Contender(name="read and digest", call=read, kind="limit"),
        ],
        references=["read and digest"],
        finish=setting.finish,
        note="Bar: ema at most 1.5 of the disk and the digest.",
    )


def many_in_a_file(setting: Setting) -> Report:
    """Ours for a quarter, half and all of the tensors, the others for all.

    A mixture of experts has 200,000 tensors. The time of one tensor should not grow with their number.
    """
    number = TENSORS[setting.size]
    cases = [("ema", number // 4), ("ema", number // 2), ("ema", number)]
    cases += [("torch.save", number), ("safetensors", number)]
    rows = []
    for name, tensors in cases:
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
        rounds=ROUNDS if setting.size != "tiny" else 1,
    )


def figures(name: str, tensors: int, setting: Setting) -> tuple[float, float, int]:
    """Seconds of a save and a load, and the peak of bytes beyond the average, in this process."""
    for call in _calls(name, 16, setting):  # code that is loaded by the first use
        call()
    save, load = _calls(name, tensors, setting)
    memory = of_process()
    memory.reset()
    before = memory.now()
    save()  # before the first load
    case = Case(
        title="",
        contenders=[Contender(name="save", call=save), Contender(name="load", call=load)],
        references=["save"],
    )
    rounds = ROUNDS if setting.size != "tiny" else 1
    found = measure(case, Effort(rounds=rounds, seconds=0, sample=0), warm=False)
    saved, loaded = (statistics.median(each.seconds[:rounds]) for each in found)
    return saved, loaded, memory.peak() - before


def _calls(name: str, tensors: int, setting: Setting) -> tuple[Callable[[], None], ...]:
    """How ``name`` saves, flushed to the disk, and loads into what is there."""
    model = split(tensors * ELEMENTS, tensors, setting)
    average, folder = EMAModel(model), _folder()
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

    return save, load


def _folder() -> Path:
    """A folder in the current one, whose disk is measured, until the process ends.

    A worker of ``multiprocessing`` leaves without ``atexit``.
    """
    folder = Path(tempfile.mkdtemp(prefix="ema-bench-", dir=Path.cwd()))
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=0)
    return folder
