"""The ratio of each contender to the limit of its case, as bars."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.report import Report

__all__ = ["draw"]

COLORS = {"ours": "#1a7f5a", "peer": "#b9c2cc", "limit": "#e3e7eb"}
INK = "#333333"
PANELS = 2
INCH_A_BAR = 0.2


def draw(reports: Iterable[Report]) -> str:
    """An SVG, a panel a case that has a limit; a line marks the limit."""
    panels = [report for report in reports if report.limit is not None]
    columns = [panels[i::PANELS] for i in range(PANELS)]
    pairs = list(zip(*(c + [None] * (len(columns[0]) - len(c)) for c in columns), strict=True))
    bars = [max(len(report.rows) for report in pair if report) for pair in pairs]
    heights = [most + 3 for most in bars]
    style = {"svg.fonttype": "none", "svg.hashsalt": "ema", "font.size": 8, "text.color": INK}
    with mpl.rc_context(style):
        figure = Figure(figsize=(10, INCH_A_BAR * sum(heights)), layout="constrained")
        grid = figure.subplots(len(pairs), PANELS, squeeze=False, height_ratios=heights)
        for line, pair, most in zip(grid, pairs, bars, strict=True):
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
    ratios = [row.ratio for row in report.rows]
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
