"""Pictures: what averaging does to a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ema.errors import ArgumentError
from ema.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "plot_live_and_averaged", "save"]

_LIVE = "#9aa5b1"
_AVERAGED = ("#d1495b", "#00798c", "#8f5aa8", "#c77d0a")  # one for each panel, in turn
_INK, _FAINT = "#2b2f36", "#e6e8eb"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#b8bec6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _FAINT,
    "xtick.color": "#5b6470",
    "ytick.color": "#5b6470",
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity over the steps of one run, with live and with averaged weights."""

    title: str
    steps: Sequence[int]
    live: Sequence[float]
    averaged: Sequence[float]


def plot_live_and_averaged(
    curves: Sequence[Curve], *, title: str = "", ylabel: str = "loss", log: bool | None = None
) -> Figure:
    """One panel for each run, on a common scale: live weights in gray, averaged in color.

    Args:
        curves: at least one; the three sequences of each are of one length.
        title: of the whole picture, at its top left.
        ylabel: what the curves are.
        log: logarithmic scale; by default where the values span more than a factor of three.

    Returns:
        A figure that belongs to no window and to no global state of matplotlib.

    Raises:
        ArgumentError: no curves are given, or the sequences of one are empty or differ in length.
        MissingExtraError: matplotlib is not installed.
    """
    if not curves:
        raise ArgumentError("`curves` must not be empty, got []")
    for curve in curves:
        lengths = (len(curve.steps), len(curve.live), len(curve.averaged))
        if len({*lengths}) != 1:
            raise ArgumentError(
                f"`curves`: steps, live and averaged of {curve.title!r} must be of one length, got"
                f" {lengths}"
            )
        if not curve.steps:
            raise ArgumentError(f"`curves`: steps of {curve.title!r} must not be empty")
    if log is None:
        values = [value for curve in curves for value in (*curve.live, *curve.averaged)]
        log = 0 < 3 * min(values) < max(values)
    require("matplotlib", "demo")
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    with rc_context(_STYLE):
        figure = Figure(figsize=(1.2 + 4.6 * len(curves), 4.4), dpi=160, layout=layout)
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for index, (panel, curve) in enumerate(zip(panels, curves, strict=True)):
            _draw(panel, curve, _AVERAGED[index % len(_AVERAGED)], log=log)
        panels[0].set_ylabel(ylabel)
        for panel in panels[1:]:
            panel.tick_params(axis="y", left=False)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write the figure, in the format that the suffix names; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw(panel: Axes, curve: Curve, color: str, *, log: bool) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    if log:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    style: dict[str, Any] = {"clip_on": False, "zorder": 3}
    panel.plot(curve.steps, curve.live, color=_LIVE, linewidth=1.4, label="live", **style)
    panel.plot(curve.steps, curve.averaged, color=color, linewidth=2.6, label="averaged", **style)
    panel.set_title(curve.title, loc="left", fontsize=11, color="#5b6470")
    panel.set_xlabel("step")
    panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    panel.set_xlim(0, max(curve.steps))
    _label_end(panel, curve, curve.live, _LIVE)
    _label_end(panel, curve, curve.averaged, color)
    panel.legend(frameon=False, loc="upper right", labelcolor="linecolor")


def _label_end(panel: Axes, curve: Curve, values: Sequence[float], color: str) -> None:
    """The last value beside the end of its curve, on its outer side, so that two do not meet."""
    above = values[-1] == max(curve.live[-1], curve.averaged[-1])
    panel.annotate(
        f"{values[-1]:#.2g}",
        (curve.steps[-1], values[-1]),
        xytext=(5, -4 if above else 4),
        textcoords="offset points",
        va="bottom" if above else "top",
        color=color,
        fontweight="bold" if values is curve.averaged else "normal",
        annotation_clip=False,
    )
