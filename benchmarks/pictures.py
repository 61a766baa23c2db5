"""The pictures of the documentation."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from benchmarks.report import Report
from ema import plan_ema
from ema.plan.quantities import show_bytes, show_seconds

__all__ = ["bars", "scaling"]

COLORS = {"ours": "#1a7f5a", "peer": "#b9c2cc", "limit": "#e3e7eb"}
INK = "#333333"
PANELS = 2
INCH_A_BAR = 0.2


def bars(reports: Iterable[Report]) -> str:
    """The ratio of each contender to the limit of its case: an SVG with a panel for each case."""
    panels = [report for report in reports if report.limit is not None]
    columns = [panels[i::PANELS] for i in range(PANELS)]
    pairs = list(zip(*(c + [None] * (len(columns[0]) - len(c)) for c in columns), strict=True))
    longest = [max(len(report.rows) for report in pair if report) for pair in pairs]
    heights = [most + 3 for most in longest]
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ema",
        "font.size": 8,
        "text.color": INK,
    }
    with rc_context(style):
        figure = Figure(figsize=(10, INCH_A_BAR * sum(heights)), layout="constrained")
        grid = figure.subplots(len(pairs), PANELS, squeeze=False, height_ratios=heights)
        for line, pair, most in zip(grid, pairs, longest, strict=True):
            for axes, report in zip(line, pair, strict=True):
                if report is None:
                    axes.remove()
                else:
                    _panel(axes, report)
                    axes.set_ylim(most - 0.5, -0.5)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _panel(axes: Any, report: Report) -> None:
    ratios = [row.ratio or 0.0 for row in report.rows]
    bars = axes.barh(
        [row.name for row in report.rows],
        ratios,
        color=[COLORS[row.kind] for row in report.rows],
        height=0.75,
    )
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.15 * max(*ratios, 1))
    axes.set_title(textwrap.fill(report.title, 46), loc="left", fontsize=8.5)
    axes.set_xlabel(f"÷ {report.limit}", loc="left", fontsize=7, labelpad=1)
    axes.xaxis.set_ticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for label, row in zip(axes.get_yticklabels(), report.rows, strict=True):
        label.set_fontweight("bold" if row.kind == "ours" else "normal")


PARAMS = 70e9
RANKS = (1, 10, 100, 1_000, 10_000)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "compensated": ("#8f5aa8", {"compensated": True}),
    "float32": ("#00798c", {}),
    "bfloat16": ("#d1495b", {"dtype": "bfloat16"}),
    "float32 in host memory": ("#c77d0a", {"offload": True}),
}
LAUNCHES = 50e-6
GRAY, DARK = "#5b6470", "#2b2f36"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "text.color": DARK,
    "axes.labelcolor": DARK,
    "axes.edgecolor": "#b8bec6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "svg.hashsalt": "scaling",  # the same file from the same figures
}


def scaling(file: Path) -> None:
    """Memory of a GPU on the left, time of an update on the right, over the number of GPUs."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        memory, time = figure.subplots(1, 2)
        for name, (color, settings) in KINDS.items():
            line: dict[str, Any] = {"color": color, "label": name, "linewidth": 2.4, "marker": "o"}
            found = [plan_ema(PARAMS, ranks, **settings) for ranks in RANKS]
            if not settings.get("offload"):
                held = [plan.average_bytes + plan.remainder_bytes for plan in found]
                memory.plot(RANKS, held, markersize=4, **line)
            time.plot(RANKS, [plan.update_seconds for plan in found], markersize=4, **line)
        _limit(memory, 80e9, "memory of an H100", at=RANKS[-1])
        _limit(time, LAUNCHES, "some kernel launches (assumed)", at=RANKS[0])
        _finish(memory, "average on each GPU", show_bytes)
        _finish(time, "time of an update", show_seconds)
        title = "70 billion bfloat16 params, sharded: on paper, at a vendor's bandwidth"
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.savefig(file, metadata={"Date": None})


def _limit(panel: Axes, value: float, text: str, *, at: int) -> None:
    panel.axhline(value, color=GRAY, linewidth=1.2, linestyle=(0, (4, 3)))
    panel.annotate(
        text,
        (at, value),
        xytext=(0, -5),
        textcoords="offset points",
        ha="left" if at == RANKS[0] else "right",
        va="top",
        color=GRAY,
    )


def _finish(panel: Axes, title: str, show: Any) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(RANKS, [f"{ranks:,}".replace(",", " ") for ranks in RANKS])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(numticks=12))
    panel.yaxis.set_major_formatter(lambda value, _: show(value))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(which="both", length=0)
    panel.set_xlabel("GPUs")
    panel.set_title(title, loc="left", fontsize=11, color=GRAY)
    panel.legend(frameon=False, loc="upper right", labelcolor="linecolor")
