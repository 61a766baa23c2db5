"""Where a case is measured and how large it is there; the machine; new processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = ["DECAY", "SIZES", "Setting", "in_fresh_process", "machine"]

DECAY = 0.999
SIZES = ("full", "quick", "tiny")
ON_ACCELERATOR = 1_500_000_000
TINY = 4096
SPARE = 0.9
PACKAGES = (
    *("ema", "torch", "jax", "optax", "flax", "diffusers", "ema-pytorch", "torch-ema", "timm"),
    "transformers",
)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One of ``SIZES`` on a device, ``"cpu"`` or ``"cuda"``. Tiny is for tests of the benchmarks."""

    device: str = "cpu"
    size: str = "full"

    @property
    def on_cpu(self) -> bool:
        """Whether the processor does the work, with its own memory."""
        return self.device == "cpu"

    @property
    def finish(self) -> Callable[[], object] | None:
        """Waits for the work on the device."""
        return None if self.on_cpu else torch.cuda.synchronize

    def elements(self, on_cpu: int, *, copies: int) -> int:
        """The number of elements in all tensors: ``on_cpu``, or 1.5 B on an accelerator.

        Fewer if ``copies`` in float32 do not fit into the free memory of the accelerator; an eighth
        in a quick run.
        """
        if self.size == "tiny":
            return TINY
        full = on_cpu if self.on_cpu else min(ON_ACCELERATOR, self.room(copies=copies))
        return full if self.size == "full" else full // 8

    def room(self, *, copies: int) -> int:
        """The number of elements of which so many copies in float32 fit into the free memory."""
        free, _ = torch.cuda.mem_get_info()
        return int(SPARE * free) // (4 * copies)


def machine(device: str) -> dict[str, str]:
    """The processor, the accelerator, and the versions of everything that is measured."""
    about = {"processor": _processor(), "cores": str(os.cpu_count())}
    about["threads"] = str(torch.get_num_threads())
    if device == "cuda":
        about |= {"accelerator": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
    about["Python"] = platform.python_version()
    return about | {package: version(package) for package in PACKAGES}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """Call a function of a module in a process in which nothing else has run.

    Memory that an earlier case has freed stays with the allocator, and can halve the cost of the
    copies that some peers make in every call. If possible, the process is forked from one that has
    imported the peers, because their import takes longer than most cases. With a GPU it is spawned:
    some imports use the GPU, and must not be forked. Arguments and result are pickled.
    """
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    server = can_fork and not torch.cuda.is_available()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(["benchmarks.peers"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(function, *args).result()
