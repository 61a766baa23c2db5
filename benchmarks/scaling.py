"""The model behind ``ema plan`` against what 1, 2 and 4 processes measure here.

    python -m benchmarks.scaling

Each rank is a process with one thread, holds its part of the same params as plain tensors, and
averages it. In every round all ranks do each of these at the same time, after a barrier: copy a
buffer of the size of the params into another; scale such a buffer in place; update. The bandwidths
of a round (bytes read + written) go into the model, and its time is compared with the update of the
same round and rank; the median over rounds and ranks counts, and quartiles tell its worth.

Copying reads the lines that it writes, where the CPU allocates them in its cache, without their
being counted. Scaling in place has no such hidden third: the two bandwidths differ by it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor, distributed, multiprocessing, nn

from benchmarks.machine import machine
from ema import EMAModel, Plan, plan_ema

TENSORS = 16
CASES: dict[str, dict[str, Any]] = {
    "float32": {"param_dtype": "float32"},
    "bfloat16": {"param_dtype": "bfloat16"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What all ranks are told: parameters of the whole model, rounds, folder for the samples."""

    params: int
    rounds: int
    out: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One rank in one round: seconds, of buffers and params of the same number of elements."""

    copy: float
    scale: float
    update: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One case on one number of ranks.

    Attributes:
        samples: of each rank, those of its rounds.
        bytes: of the averages of each rank.
        resident: bytes by which the memory of each rank grew when the average was made.
    """

    case: str
    ranks: int
    params: int
    samples: list[list[Sample]]
    bytes: list[int]
    resident: list[int]

    def plan(self, bandwidth: float) -> Plan:
        return plan_ema(self.params, self.ranks, memory_bandwidth=bandwidth, **CASES[self.case])

    def median(self, value: Callable[[Sample], float]) -> float:
        return statistics.median(value(sample) for rank in self.samples for sample in rank)

    def bandwidth(self, sample: Sample, kind: str) -> float:
        """Bytes a second of one rank: a float32 read and a float32 written for each element."""
        return 8 * (self.params // self.ranks) / getattr(sample, kind)

    def median_bandwidth(self, kind: str) -> float:
        return self.median(lambda sample: self.bandwidth(sample, kind))

    def ratios(self, kind: str) -> str:
        """Measured / predicted from that bandwidth: median and quartiles."""
        low, middle, high = statistics.quantiles(
            (
                sample.update / self.plan(self.bandwidth(sample, kind)).update_seconds
                for rank in self.samples
                for sample in rank
            ),
            n=4,
        )
        return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def rank_main(rank: int, ranks: int, port: int, job: Job) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    size = job.params // ranks
    source, target = torch.ones(size), torch.ones(size)
    found = {case: run_case(case, job.rounds, source, target) for case in CASES}
    Path(job.out, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def run_case(case: str, rounds: int, source: Tensor, target: Tensor) -> dict[str, Any]:
    """One rank's part of a case; the buffers have as many elements as its params."""
    dtype = getattr(torch, CASES[case]["param_dtype"])
    size = source.numel() // TENSORS
    model = nn.ParameterList([torch.randn(size).to(dtype) for _ in range(TENSORS)])
    gc.collect()
    before = psutil.Process().memory_info().rss
    average = EMAModel(model, 0.999)
    average.update()
    resident = psutil.Process().memory_info().rss - before
    samples = []
    for _ in range(rounds):
        copy = timed(lambda: target.copy_(source))
        scale = timed(lambda: target.mul_(1.0))
        samples.append({"copy": copy, "scale": scale, "update": timed(average.update)})
    held = sum(a.numel() * a.element_size() for a in average.averaged_parameters().values())
    return {"samples": samples, "bytes": held, "resident": resident}


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call that all ranks begin together, the second of two in a row."""
    distributed.barrier()
    call()  # what the caches hold must not depend on what came before
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(ranks: int, params: int, rounds: int) -> list[Result]:
    """Run all cases on this number of ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as out:
        job = Job(params=params, rounds=rounds, out=out)
        multiprocessing.spawn(rank_main, (ranks, port, job), nprocs=ranks)
        found = [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(ranks)]
    return [
        Result(
            case=case,
            ranks=ranks,
            params=params,
            samples=[[Sample(**sample) for sample in rank[case]["samples"]] for rank in found],
            bytes=[rank[case]["bytes"] for rank in found],
            resident=[rank[case]["resident"] for rank in found],
        )
        for case in CASES
    ]


def table(results: list[Result]) -> Table:
    """A row for each case and number of ranks, as the page shows them."""
    shown = Table(
        box=MARKDOWN,
        title=f"{results[0].params / 1e6:.3g} M parameters, measured / predicted",
        title_justify="left",
        caption=f"load average {os.getloadavg()[0]:.1f}, {len(results[0].samples[0])} rounds",
        caption_justify="left",
    )
    for column in (
        "params",
        "ranks",
        "average a rank",
        "resident ÷ predicted",
        "copy GB/s",
        "in place GB/s",
        "update",
        "÷ by copy",
        "÷ by in place",
    ):
        shown.add_column(column, justify="left" if column == "params" else "right")
    for result in results:
        predicted = result.plan(1.0).average_bytes
        assert max(result.bytes) == predicted, (result.bytes, predicted)
        shown.add_row(
            result.case,
            f"{result.ranks}",
            f"{predicted / 1e6:.1f} MB",
            f"{max(result.resident) / predicted:.3f}",
            f"{result.median_bandwidth('copy') / 1e9:.1f}",
            f"{result.median_bandwidth('scale') / 1e9:.1f}",
            f"{result.median(lambda sample: sample.update) * 1e3:.1f} ms",
            result.ratios("copy"),
            result.ratios("scale"),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--params", type=int, default=1 << 26)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the ranks inherit it
    console, about = Console(), machine("cpu")
    console.print("  ".join(f"{key} {value}" for key, value in about.items()), style="dim")
    runs = [measure(ranks, arguments.params, arguments.rounds) for ranks in arguments.ranks]
    results = [result for case in zip(*runs, strict=True) for result in case]
    console.print(table(results))
    if arguments.json is not None:
        data = {"machine": about, "results": [dataclasses.asdict(result) for result in results]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
