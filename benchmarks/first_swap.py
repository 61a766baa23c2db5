"""What the first swaps of a process take: in turn, each contender in processes of its own.

    python -m benchmarks.first_swap

The ``swap`` case repeats a swap, so that the copies of the peers find memory that their last one
has given back. In training others have taken it meanwhile, or the system has: a first swap asks the
system for the memory of every copy. Here are the first and the second one, in order.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from rich.console import Console

from benchmarks.machine import machine
from benchmarks.models import gpt2
from benchmarks.process import in_fresh_process
from benchmarks.setting import Setting

SWAPS = 2


def names() -> list[str]:
    """Whose swap there is; asked for where the peers are imported anyway."""
    from benchmarks.peers import SWAPS as MAKERS

    return [*MAKERS]


def first_swaps(name: str, setting: Setting) -> list[float]:
    """Seconds of the first swaps in and out of this process."""
    from benchmarks.peers import SWAPS as MAKERS

    swap = MAKERS[name](gpt2(setting))
    seconds = []
    for _ in range(SWAPS):
        begun = time.perf_counter()
        swap()
        seconds.append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_swap", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", choices=("full", "quick", "tiny"), default="full")
    arguments = parser.parse_args()
    setting = Setting(size=arguments.size)
    found: dict[str, list[list[float]]] = {name: [] for name in in_fresh_process(names)}
    for _ in range(arguments.rounds):
        for name, samples in found.items():
            samples.append(in_fresh_process(first_swaps, name, setting))
    console = Console()
    console.print("  ".join(f"{key} {value}" for key, value in machine("cpu").items()), style="dim")
    for name, samples in found.items():
        shown = []
        for index in range(SWAPS):
            each = [sample[index] for sample in samples]
            ratio = median(
                theirs[index] / ours[index]
                for theirs, ours in zip(samples, found["ema"], strict=True)
            )
            shown.append(f"{median(each) * 1e3:7.1f} ms, {ratio:5.2f} of ema's")
        console.print(f"{name:<18} first {shown[0]}    second {shown[1]}")


if __name__ == "__main__":
    main()
