"""``python -m benchmarks``: measure the cases and print a table for each."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.cases import CASES
from benchmarks.measure import Case, Measurement
from benchmarks.process import in_fresh_process
from benchmarks.report import machine, table, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--cases", nargs="+", metavar="NAME", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer rounds")
    arguments = parser.parse_args()
    console, about = Console(), machine()
    console.print("  ".join(f"{key} {value}" for key, value in about.items()), style="dim")
    results: dict[str, tuple[Case, list[Measurement]]] = {}
    for name in arguments.cases:
        with console.status(name):
            results[name] = in_fresh_process(name, quick=arguments.quick)
        console.print(table(*results[name]))
    if arguments.json is not None:
        write(arguments.json, about, results)


if __name__ == "__main__":
    main()
