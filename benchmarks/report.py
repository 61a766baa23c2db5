"""What was measured, as tables and as a file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.measure import Case, Measurement

__all__ = ["machine", "table", "write"]

PACKAGES = (
    "ema",
    "torch",
    "jax",
    "optax",
    "flax",
    "diffusers",
    "ema-pytorch",
    "torch-ema",
    "transformers",
)
STYLES = {"ours": "bold green", "limit": "dim", "peer": ""}


def machine() -> dict[str, Any]:
    """The processor, how busy it is, and the versions of what is measured."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def table(case: Case, measurements: Sequence[Measurement]) -> Table:
    """A row a contender, a column a reference."""
    result = Table(
        title=case.title,
        title_justify="left",
        title_style="bold",
        caption=f"load average {os.getloadavg()[0]:.1f}, {len(measurements[0].seconds)} rounds",
        caption_justify="left",
    )
    result.add_column("", no_wrap=True)
    result.add_column("median", justify="right", no_wrap=True)
    result.add_column("quartiles", justify="right", no_wrap=True)
    for reference in case.references:
        result.add_column(f"÷ {reference}", justify="right")
    for row in measurements:
        low, high = row.quartiles
        result.add_row(
            row.name,
            f"{row.median * 1e3:.3g} ms",
            f"{low * 1e3:.3g}–{high * 1e3:.3g}",
            *(f"{row.ratios[reference]:.2f}" for reference in case.references),
            style=STYLES[row.kind],
        )
    return result


def write(
    path: Path,
    about: Mapping[str, Any],
    results: Mapping[str, tuple[Case, Sequence[Measurement]]],
) -> None:
    """Machine, titles and every sample as JSON."""
    cases = {
        name: {"title": case.title, "contenders": [row.to_dict() for row in rows]}
        for name, (case, rows) in results.items()
    }
    text = json.dumps({"machine": dict(about), "cases": cases}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
