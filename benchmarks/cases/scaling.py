"""The model behind ``ema plan`` against the figures of 1, 2 and 4 processes.

Each rank is a process with one thread, and averages its part of the params. In every round all ranks copy a
buffer of the size of their params, scale one in place, and update, each after a barrier. The two bandwidths
of a round go into the model, and its time is compared with the update of the same round and rank. See
``docs/scaling.md``.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, distributed, multiprocessing

from benchmarks.models import vectors
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
        Row(name=dtype, kind="ours", cells=_cells(dtype, params, [each[dtype] for each in of]))
        for dtype in DTYPES
        for of in found.values()
    ]
    title = f"{params / 1e6:.3g} M parameters, measured / predicted"
    return Report(title=title, columns=COLUMNS, rows=rows, rounds=rounds)


def _cells(dtype: str, params: int, found: list[dict[str, Any]]) -> list[str]:
    ranks = len(found)
    plan = plan_ema(params, ranks, param_dtype=dtype, memory_bandwidth=1.0)  # a byte a second
    assert max(rank["bytes"] for rank in found) == plan.average_bytes
    samples = [sample for rank in found for sample in rank["samples"]]
    rates, ratios = [], []
    for kind in ("copy", "scale"):
        # bytes a second of one rank: a float32 read and a float32 written for each element
        bandwidths = [8 * (params // ranks) / sample[kind] for sample in samples]
        rates.append(f"{statistics.median(bandwidths) / 1e9:.1f}")
        predicted = [plan.update_seconds / bandwidth for bandwidth in bandwidths]
        pairs = zip(samples, predicted, strict=True)
        each = [sample["update"] / seconds for sample, seconds in pairs]
        low, middle, high = statistics.quantiles(each, n=4)
        ratios.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
    return [
        f"{ranks}",
        f"{plan.average_bytes / 1e6:.1f} MB",
        f"{max(rank['resident'] for rank in found) / plan.average_bytes:.3f}",
        *rates,
        f"{statistics.median(sample['update'] for sample in samples) * 1e3:.1f} ms",
        *ratios,
    ]


def _measured(ranks: int, params: int, rounds: int) -> list[dict[str, Any]]:
    """The figures of each rank, by dtype."""
    os.environ["OMP_NUM_THREADS"] = "1"  # the ranks inherit it
    with tempfile.TemporaryDirectory() as out:
        multiprocessing.spawn(rank_main, (ranks, params // ranks, rounds, out), nprocs=ranks)
        return [json.loads(Path(out, f"{rank}.json").read_text()) for rank in range(ranks)]


def rank_main(rank: int, ranks: int, size: int, rounds: int, out: str) -> None:
    """The program of each process, which averages ``size`` elements of every dtype."""
    torch.set_num_threads(1)
    meeting = Path(out, "meeting").as_uri()
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    source, target = torch.ones(size), torch.ones(size)
    found = {dtype: _of_dtype(dtype, rounds, source, target) for dtype in DTYPES}
    Path(out, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def _of_dtype(dtype: str, rounds: int, source: Tensor, target: Tensor) -> dict[str, Any]:
    """The part of one rank; the buffers have as many elements as its params."""
    options = {"tensors": TENSORS, "dtype": getattr(torch, dtype)}
    model = vectors(source.numel(), Setting(), **options)
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
