"""``python -m benchmarks``: measure the cases and print a table for each."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

from rich.console import Console

from benchmarks.cases import CASES
from benchmarks.measure import Case, Effort, Measurement, measure
from benchmarks.report import machine, table, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--cases", nargs="+", metavar="NAME", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer rounds")
    arguments = parser.parse_args()
    effort = Effort(rounds=10 if arguments.quick else 40)
    console, about = Console(), machine()
    console.print("  ".join(f"{key} {value}" for key, value in about.items()), style="dim")
    results: dict[str, tuple[Case, list[Measurement]]] = {}
    for name in arguments.cases:
        case = CASES[name](quick=arguments.quick)
        with console.status(case.title):
            rows = measure(case, effort)
        console.print(table(case, rows))
        results[name] = (Case(title=case.title, contenders=(), references=()), rows)
        del case
        gc.collect()  # models and averages of several GiB
    if arguments.json is not None:
        write(arguments.json, about, results)


if __name__ == "__main__":
    main()
