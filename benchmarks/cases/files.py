"""Save to and load from ``ema.safetensors``, against the disk alone.

The limit of a save is to write the same bytes at once and wait for the disk; that of a load to read
them at once and digest them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path

import torch
import xxhash

from benchmarks.measure import Case, Contender
from benchmarks.models import gpt2, size
from benchmarks.setting import Setting
from ema.torch_backend import EMAModel

__all__ = ["build_load", "build_save"]


def build_save(setting: Setting) -> Case:
    model = gpt2(setting)
    average, folder = EMAModel(model), _folder()
    content = memoryview(average.save(folder / "first").read_bytes())

    def safely() -> None:
        average.save(folder / "ours")

    def pickled() -> None:
        with (folder / "state.pt").open("wb") as stream:
            torch.save(average.state_dict(), stream)
            stream.flush()
            os.fsync(stream.fileno())  # what it left would be written while another is timed

    def write() -> None:
        # beside the old file, as a save must: its pages of the cache are not there to be used again
        with (folder / "new").open("wb", buffering=0) as stream:
            rest = content
            while rest:
                rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
        (folder / "new").replace(folder / "raw")

    return Case(
        title=f"save: GPT-2, {size(model)}",
        contenders=[
            Contender(name="ema", call=safely, kind="ours"),
            Contender(name="torch.save and fsync", call=pickled),
            Contender(name="write and fsync", call=write, kind="limit"),
        ],
        references=["write and fsync"],
        finish=setting.finish,
        note="Bar: ema at most 1.5 of the disk.",
    )


def build_load(setting: Setting) -> Case:
    model = gpt2(setting)
    average, folder = EMAModel(model), _folder()
    file = average.save(folder)
    torch.save(average.state_dict(), folder / "state.pt")

    def load() -> None:
        average.load(folder)

    def unpickle() -> None:
        average.load_state_dict(torch.load(folder / "state.pt"))

    def read() -> None:
        xxhash.xxh3_128_hexdigest(file.read_bytes())

    return Case(
        title=f"load: GPT-2, {size(model)}",
        contenders=[
            Contender(name="ema", call=load, kind="ours"),
            Contender(name="torch.load, no digest", call=unpickle),
            Contender(name="read and digest", call=read, kind="limit"),
        ],
        references=["read and digest"],
        finish=setting.finish,
        note="Bar: ema at most 1.5 of the disk and the digest.",
    )


def _folder() -> Path:
    """In the current one, whose disk is to be measured, until the process ends.

    A worker of ``multiprocessing`` leaves without ``atexit``.
    """
    folder = Path(tempfile.mkdtemp(prefix="ema-bench-", dir=Path.cwd()))
    Finalize(None, shutil.rmtree, args=(folder,), kwargs={"ignore_errors": True}, exitpriority=0)
    return folder
