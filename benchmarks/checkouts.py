"""``python -m benchmarks.checkouts OLD``: is this checkout as fast as another one?

Each round starts one process for each checkout, in a random order. A process times every case. The table
shows the median over the rounds of the ratio new ÷ old, and an interval that contains the true median with
a probability of at least 95 %.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from math import comb
from pathlib import Path
from typing import Any

NEW = Path(__file__).parents[1]
BAR = 1.03
SAMPLES = 15
SECONDS = 0.05
"""Length of a sample; short calls are repeated."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkouts", description=__doc__)
    parser.add_argument("old", type=Path, metavar="OLD", help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    ratios: dict[str, list[float]] = {}
    old = arguments.old.resolve()
    sides = [NEW, old]
    for _ in range(arguments.rounds):
        random.shuffle(sides)
        found = {side: times_of(side) for side in sides}
        for case, seconds in found[NEW].items():
            ratios.setdefault(case, []).append(seconds / found[old][case])
    for case, each in ratios.items():
        low, high = interval(each)
        held = "" if statistics.median(each) <= BAR or low <= 1 <= high else f"  above {BAR}"
        print(f"{case:24} {statistics.median(each):.3f}  ({low:.3f} to {high:.3f}){held}")


def times_of(checkout: Path) -> dict[str, float]:
    """Seconds of each case in a new process that imports ``ema`` from a checkout."""
    names = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, cwd=checkout, env=os.environ | names, check=True, stdout=subprocess.PIPE
    )
    found: dict[str, Any] = json.loads(done.stdout)
    if Path(found["ema"]).parents[1] != checkout:
        raise RuntimeError(f"{checkout} must hold the `ema` that it imports, got {found['ema']}")
    seconds: dict[str, float] = found["seconds"]
    return seconds


def interval(values: list[float]) -> tuple[float, float]:
    """The sign test's interval for the median: two values of the sample, at least 95 % sure."""
    ordered, n = sorted(values), len(values)
    cut = 0  # values left out at each end
    while 2 * sum(comb(n, k) for k in range(cut + 2)) <= 0.05 * 2**n:
        cut += 1
    return ordered[cut], ordered[n - 1 - cut]


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """A name and a call for each case; only public names of ``ema``, so that old versions run it."""
    import jax
    import jax.numpy as jnp
    import optax
    import torch
    from torch import nn

    import ema

    def model(elements: int, tensors: int, dtype: torch.dtype = torch.float32) -> nn.Module:
        each = (torch.randn(elements // tensors, dtype=dtype) for _ in range(tensors))
        return nn.ParameterList([nn.Parameter(vector) for vector in each])

    small = model(256_000, 1_000)
    few = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 2))
    yield "1,000 vectors", ema.EMAModel(small, decay=0.999).update
    yield "few tensors", ema.EMAModel(few, decay=0.999).update
    yield "16 M in 64 tensors", ema.EMAModel(model(1 << 24, 64), decay=0.999).update
    half = model(1 << 23, 64, torch.bfloat16)
    yield "bfloat16 average", ema.EMAModel(half, decay=0.999, dtype=torch.bfloat16).update
    yield "compensated", ema.EMAModel(model(1 << 23, 64), decay=0.999, compensated=True).update
    swapped = ema.EMAModel(model(1 << 22, 64), decay=0.999)

    def swap() -> None:
        with swapped.use_ema():
            pass

    yield "swap in and back", swap

    tx = optax.chain(optax.sgd(1e-3), ema.params_ema(decay=0.999))
    params = [jnp.ones((64, 64)) for _ in range(24)]
    state = tx.init(params)

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step)
    yield "JAX step", lambda: jax.block_until_ready(compiled(params, state))

    def trace() -> None:
        def again(params: Any, state: Any) -> Any:  # `jit` remembers the trace of a function
            return step(params, state)

        jax.jit(again).trace(params, state)

    yield "JAX trace", trace
    yield "JAX eager update", lambda: jax.block_until_ready(step(params, state))


def timed(call: Callable[[], object]) -> float:
    """The median over the samples of the seconds of one call."""
    call()
    start = time.perf_counter()
    call()
    calls = max(1, round(SECONDS / (time.perf_counter() - start)))
    samples = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls)
    return statistics.median(samples)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main()
    else:
        import ema

        print(json.dumps({"ema": ema.__file__, "seconds": {n: timed(c) for n, c in cases()}}))
