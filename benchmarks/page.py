"""The figures and the pictures in ``docs``, from the files of results.

    python -m benchmarks.page

writes ``docs/benchmarks.md`` anew between the marks of each device that has a file, with a picture and a
table for each case, and draws ``docs/scaling.svg`` from the model behind ``ema plan``.
"""

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

from benchmarks.report import Report, Results
from ema import plan_ema
from ema.plan.quantities import show_bytes, show_seconds

__all__ = ["DOCS", "bars", "markdown", "scaling", "write_page"]

DOCS = Path(__file__).parents[1] / "docs"
DEVICES = ("cpu", "cuda")

COLORS = {"ours": "#1a7f5a", "peer": "#b9c2cc", "limit": "#e3e7eb"}
INK, GRAY, DARK = "#333333", "#5b6470", "#2b2f36"
PANELS = 2
INCH_A_BAR = 0.2
STYLE_OF_BARS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ema",  # the same file from the same figures
    "font.size": 8,
    "text.color": INK,
}

PARAMS = 70e9
RANKS = (1, 10, 100, 1_000, 10_000)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "compensated": ("#8f5aa8", {"compensated": True}),
    "float32": ("#00798c", {}),
    "bfloat16": ("#d1495b", {"dtype": "bfloat16"}),
    "float32 in host memory": ("#c77d0a", {"offload": True}),
}
LAUNCHES = 50e-6
STYLE_OF_SCALING: dict[Any, Any] = {
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
    "svg.hashsalt": "scaling",
}


def write_page(folder: Path = DOCS) -> None:
    """Rewrite the marked blocks and the pictures of the cases."""
    page = folder / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    for device in DEVICES:
        file = folder / f"benchmarks-{device}.json"
        if not file.exists():
            continue
        results, picture = Results.read(file), file.with_suffix(".svg")
        picture.write_text(bars(results.cases.values()), encoding="utf-8")
        text = _between(text, device, markdown(results, picture.name))
    page.write_text(text, encoding="utf-8")


def _between(text: str, mark: str, block: str) -> str:
    begin, end = f"<!-- {mark}: written by benchmarks/page.py -->", f"<!-- end of {mark} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page has no block between {begin} and {end}")
    return f"{before}{begin}\n\n{block}\n\n{end}{after}"


def markdown(results: Results, picture: str) -> str:
    """Machine, picture and tables."""
    about = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    parts = [f"Measured on {about}.", f"![times over the limit, case by case]({picture})"]
    for name, report in results.cases.items():
        lines = ["| | " + " | ".join(report.columns) + " |", "|---|" + "--:|" * len(report.columns)]
        for row in report.rows:
            shown = f"**{row.name}**" if row.kind == "ours" else row.name
            lines.append("| " + " | ".join([shown, *row.cells]) + " |")
        parts += [f"### `{name}`: {report.title}", "\n".join(lines), report.caption]
    return "\n\n".join(parts)


def bars(reports: Iterable[Report]) -> str:
    """The ratio of each contender to the limit of its case: an SVG with a panel for each case."""
    shown = [report for report in reports if report.limit is not None]
    lines = [shown[i : i + PANELS] for i in range(0, len(shown), PANELS)]
    longest = [max(len(report.rows) for report in line) for line in lines]
    heights = [most + 3 for most in longest]
    with rc_context(STYLE_OF_BARS):
        figure = Figure(figsize=(10, INCH_A_BAR * sum(heights)), layout="constrained")
        grid = figure.subplots(len(lines), PANELS, squeeze=False, height_ratios=heights)
        for axes in grid.flat[len(shown) :]:
            axes.remove()
        for axes, report in zip(grid.flat, shown, strict=False):
            _panel(axes, report)
        for line, most in zip(grid, longest, strict=True):
            for axes in line:
                axes.set_ylim(most - 0.5, -0.5)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _panel(axes: Any, report: Report) -> None:
    names = [row.name for row in report.rows]
    ratios = [row.ratio or 0.0 for row in report.rows]
    bars = axes.barh(names, ratios, color=[COLORS[row.kind] for row in report.rows], height=0.75)
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


def scaling(file: Path) -> None:
    """Memory of a GPU on the left, time of an update on the right, over the number of GPUs."""
    with rc_context(STYLE_OF_SCALING):
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
    side = "left" if at == RANKS[0] else "right"
    below: dict[str, Any] = {"xytext": (0, -5), "textcoords": "offset points", "va": "top"}
    panel.annotate(text, (at, value), ha=side, color=GRAY, **below)


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


if __name__ == "__main__":
    write_page()
    scaling(DOCS / "scaling.svg")
