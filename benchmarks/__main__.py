"""``python -m benchmarks``: measure the cases and print a table for each.

``--docs`` writes the figures of ``docs/benchmarks.md`` anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.cases import NAMES, SHOWN, run
from benchmarks.page import DOCS, write_page
from benchmarks.report import Results, table
from benchmarks.setting import SIZES, Setting, machine

WIDTH = 120


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--cases", nargs="+", metavar="NAME", choices=NAMES, default=SHOWN)
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="of the PyTorch cases; JAX takes its own default",
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--quick", dest="size", action="store_const", const="quick")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write every sample; cases in FILE that are not measured now stay",
    )
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md anew")
    arguments = parser.parse_args()
    setting = Setting(device=arguments.device, size=arguments.size)
    file = DOCS / f"benchmarks-{setting.device}.json" if arguments.docs else arguments.json
    about = machine(setting.device)
    results = Results(about) if file is None else Results.read(file, about)
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print("  ".join(f"{key} {value}" for key, value in about.items()), style="dim")
    for name in arguments.cases:
        with console.status(name):
            results.cases[name] = run(name, setting)
        console.print(table(results.cases[name]))
        if file is not None:
            results.write(file, order=NAMES)
    if arguments.docs:
        write_page()


if __name__ == "__main__":
    main()
