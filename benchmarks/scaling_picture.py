"""Draw the picture of ``docs/scaling.md`` from the model behind ``ema plan``.

python -m benchmarks.scaling_picture
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from ema import Plan, plan_ema
from ema.plan.quantities import show_bytes, show_seconds

PARAMS = 70e9
RANKS = (1, 10, 100, 1_000, 10_000)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "compensated": ("#8f5aa8", {"compensated": True}),
    "float32": ("#00798c", {}),
    "bfloat16": ("#d1495b", {"dtype": "bfloat16"}),
    "float32 in host memory": ("#c77d0a", {"offload": True}),
}
LAUNCHES = 50e-6
GRAY, INK = "#5b6470", "#2b2f36"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
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


def plans(settings: dict[str, Any]) -> list[Plan]:
    return [plan_ema(PARAMS, ranks, **settings) for ranks in RANKS]


def draw() -> Figure:
    """Memory a GPU on the left, time an update on the right, over the number of GPUs."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        memory, time = figure.subplots(1, 2)
        for name, (color, settings) in KINDS.items():
            line: dict[str, Any] = {"color": color, "label": name, "linewidth": 2.4, "marker": "o"}
            found = plans(settings)
            if not settings.get("offload"):
                held = [plan.average_bytes + plan.remainder_bytes for plan in found]
                memory.plot(RANKS, held, markersize=4, **line)
            time.plot(RANKS, [plan.update_seconds for plan in found], markersize=4, **line)
        limit(memory, 80e9, "memory of an H100", at=RANKS[-1])
        limit(time, LAUNCHES, "some kernel launches (assumed)", at=RANKS[0])
        finish(memory, "average on each GPU", show_bytes)
        finish(time, "time of an update", show_seconds)
        title = "70 billion bfloat16 params, sharded: on paper, at a vendor's bandwidth"
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def limit(panel: Axes, value: float, text: str, *, at: int) -> None:
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


def finish(panel: Axes, title: str, show: Any) -> None:
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling_picture")
    parser.add_argument("--out", type=Path, default=Path("docs/scaling.svg"))
    with rc_context(STYLE):
        draw().savefig(parser.parse_args().out, metadata={"Date": None})
