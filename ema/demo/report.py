"""The text and the picture of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from ema.demo.compare import Comparison
from ema.demo.data import Digits
from ema.demo.result import Run, Score
from ema.plotting import Curve, plot_live_and_averaged, save

__all__ = ["draw", "print_comparison", "print_end", "print_scores", "print_task", "progress"]


def print_task(
    console: Console, digits: Digits, held_out: Digits, steps: int, decay: float
) -> None:
    """The next step of the demo, in one sentence."""
    console.print(
        f"{len(digits.labels)} handwritten digits to learn, {len(held_out.labels)} held out"
        f"\n{steps} steps, decay {decay:.5f}, a half-life of {steps / 10:g} steps",
        highlight=False,
    )


def progress(console: Console) -> Progress:
    """Bars that stay when they are full; without a terminal only their end is printed."""
    return Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def print_scores(console: Console, runs: Sequence[Run], held_out: int) -> None:
    """The table: loss and accuracy of live and averaged weights after the last step."""
    table = Table(title=f"{held_out} held-out digits after {runs[0].steps[-1]} steps")
    table.add_column("backend")
    table.add_column("weights")
    table.add_column("loss", justify="right")
    table.add_column("accuracy", justify="right")
    for run in runs:
        live, averaged = run.live[-1], run.averaged[-1]
        table.add_row(run.backend, "live", *_cells(live, averaged))
        table.add_row("", "averaged", *_cells(averaged, live), end_section=True)
    console.print(table)


def _cells(ours: Score, theirs: Score) -> tuple[Text, Text]:
    """Loss and accuracy, the better of the two in green."""
    return (
        Text(f"{ours.loss:.3f}", style="bold green" if ours.loss < theirs.loss else ""),
        Text(f"{ours.accuracy:.1%}", style="bold green" if ours.accuracy > theirs.accuracy else ""),
    )


def print_comparison(console: Console, comparison: Comparison, run: Run) -> None:
    """The sentence about the bits."""
    console.print(
        f"The weights of the {run.backend} run, step by step, through EMAModel and params_ema:\n"
        f"{comparison.differing:,} of {comparison.elements:,} elements of the averages differ.",
        style="red" if comparison.differing else "green",
        highlight=False,
    )


def print_end(console: Console, picture: Path | None, left_out: Sequence[str]) -> None:
    """Print the path of the picture, and each part left out because a package is missing."""
    if picture is not None:
        console.print(Text(f"Held-out loss over steps: {picture}"), soft_wrap=True)
    for line in left_out:
        console.print(Text(line, style="yellow"), soft_wrap=True)


def draw(runs: Sequence[Run], path: Path) -> Path:
    """Held-out loss over steps, live against averaged, a panel for each backend.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    curves = [
        Curve(
            title=f"{run.backend}: {run.loop}",
            steps=run.steps,
            live=[score.loss for score in run.live],
            averaged=[score.loss for score in run.averaged],
        )
        for run in runs
    ]
    figure = plot_live_and_averaged(
        curves,
        title="Live and averaged weights on held-out handwritten digits",
        ylabel="cross-entropy (nats)",
    )
    return save(figure, path)
