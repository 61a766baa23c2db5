"""A report in the terminal."""

from __future__ import annotations

from rich.table import Table

from benchmarks.report import Report

__all__ = ["table"]

STYLES = {"ours": "bold green", "limit": "dim", "peer": ""}


def table(report: Report) -> Table:
    """A row a contender."""
    result = Table(
        title=report.title,
        title_justify="left",
        title_style="bold",
        caption=report.caption,
        caption_justify="left",
    )
    result.add_column("", no_wrap=True)
    for column in report.columns:
        result.add_column(column, justify="right")
    for row in report.rows:
        result.add_row(row.name, *row.cells, style=STYLES[row.kind])
    return result
