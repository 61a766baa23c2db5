"""The model behind ``ema plan`` against the figures of 1, 2 and 4 processes.

Each rank is a process with one thread. It holds its part of the same params as plain tensors and averages
it. In every round all ranks do each of these at the same time, after a barrier: copy a buffer of the size
of the params into another; scale such a buffer in place; update. The bandwidths of a round (bytes read and
written) go into the model, and its time is compared with the update of the same round and rank. The table
shows medians and quartiles over rounds and ranks.

A copy reads the lines that it writes, if the CPU allocates them in its cache, and these reads are not
counted. Scaling in place has no such hidden third: the two bandwidths differ by it.
"""

from __future__ import annotations

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
from torch import Tensor, distributed, multiprocessing, nn

from benchmarks.report import Report, Row
from benchmarks.setting import DECAY, Setting
from ema import EMAModel, plan_ema

TENSORS = 16
DTYPES = ("float32", "bfloat16")
RANKS = {"full": (1, 2, 4), "quick": (1, 2, 4), "tiny": (1, 2)}
PARAMS = {"full": 1 << 26, "quick": 1 << 23, "tiny": 1 << 12}
ROUNDS = {"full": 25, "quick": 10, "tiny": 2}
COLUMNS = [
    *("ranks", "average a rank", "resident ÷ predicted", "copy GB/s", "in place GB/s", "update"),
    *("÷ by copy", "÷ by in place"),
]


def scaling(setting: Setting) -> Report:
    """A row for each dtype and number of ranks."""
    params, rounds = PARAMS[setting.size], ROUNDS[setting.size]
    found = {ranks: _measured(ranks, params, rounds) for ranks in RANKS[setting.size]}
    rows = [
        Row(
            name=dtype,
            kind="ours",
            cells=_cells(dtype, ranks, params, [each[dtype] for each in of]),
        )
        for dtype in DTYPES
        for ranks, of in found.items()
    ]
    title = f"{params / 1e6:.3g} M parameters, measured / predicted"
    return Report(title=title, columns=COLUMNS, rows=rows, rounds=rounds)


def _cells(dtype: str, ranks: int, params: int, found: list[dict[str, Any]]) -> list[str]:
    size = params // ranks
    samples = [sample for rank in found for sample in rank["samples"]]
    plan = plan_ema(params, ranks, param_dtype=dtype, memory_bandwidth=1.0)
    predicted = plan.average_bytes
    assert max(rank["bytes"] for rank in found) == predicted

    def bandwidth(sample: dict[str, float], kind: str) -> float:
        """Bytes a second of one rank: a float32 read and a float32 written for each element."""
        return 8 * size / sample[kind]

    def ratios(kind: str) -> str:
        """Measured / predicted from that bandwidth: median and quartiles."""
        seconds = plan.update_seconds  # at one byte a second
        each = [sample["update"] / (seconds / bandwidth(sample, kind)) for sample in samples]
        low, middle, high = statistics.quantiles(each, n=4)
        return f"{middle:.2f} ({low:.2f}–{high:.2f})"

    rates = [statistics.median(bandwidth(s, kind) for s in samples) for kind in ("copy", "scale")]
    return [
        f"{ranks}",
        f"{predicted / 1e6:.1f} MB",
        f"{max(rank['resident'] for rank in found) / predicted:.3f}",
        *(f"{rate / 1e9:.1f}" for rate in rates),
        f"{statistics.median(sample['update'] for sample in samples) * 1e3:.1f} ms",
        ratios("copy"),
        ratios("scale"),
    ]


def _measured(ranks: int, params: int, rounds: int) -> list[dict[str, Any]]:
    """The figures of each rank, by dtype."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"  # the ranks inherit it
    with tempfile.TemporaryDirectory() as out:
        job = Job(ranks=ranks, port=port, size=params // ranks, rounds=rounds, out=out)
        multiprocessing.spawn(rank_main, (job,), nprocs=ranks)
        return [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(ranks)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What all ranks do: the elements of each, rounds, and the folder for their figures."""

    ranks: int
    port: int
    size: int
    rounds: int
    out: str


def rank_main(rank: int, job: Job) -> None:
    """The program of each process."""
    torch.set_num_threads(1)
    method = f"tcp://127.0.0.1:{job.port}"
    distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=job.ranks)
    source, target = torch.ones(job.size), torch.ones(job.size)
    found = {dtype: _of_dtype(dtype, job.rounds, source, target) for dtype in DTYPES}
    Path(job.out, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def _of_dtype(dtype: str, rounds: int, source: Tensor, target: Tensor) -> dict[str, Any]:
    """The part of one rank; the buffers have as many elements as its params."""
    size = source.numel() // TENSORS
    vectors = (torch.randn(size).to(getattr(torch, dtype)) for _ in range(TENSORS))
    model = nn.ParameterList(vectors)
    gc.collect()
    before = psutil.Process().memory_info().rss
    average = EMAModel(model, DECAY)
    average.update()
    resident = psutil.Process().memory_info().rss - before
    works: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "scale": lambda: target.mul_(1.0),
        "update": average.update,
    }
    samples = [{name: _timed(call) for name, call in works.items()} for _ in range(rounds)]
    held = sum(a.numel() * a.element_size() for a in average.averaged_parameters().values())
    return {"samples": samples, "bytes": held, "resident": resident}


def _timed(call: Callable[[], object]) -> float:
    """Seconds of a call that all ranks begin together, the second of two in a row."""
    distributed.barrier()
    call()  # the caches must not depend on the work before
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
