"""Measurements as rows of text: for the terminal, for a file and for the page."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.timing import Case

__all__ = ["Report", "Results", "Row", "of_times", "short", "table"]

STYLES = {"ours": "bold green", "limit": "dim", "peer": ""}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One contender: its kind, a cell for each column, its ratio to the limit, and every sample."""

    name: str
    kind: str
    cells: list[str]
    ratio: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The table of a case.

    Attributes:
        title: what was done, on what.
        columns: their heads.
        rows: of contenders.
        limit: the contender that ``Row.ratio`` is the ratio to.
        note: what the table should show.
        load: how busy the machine was: the load average of a minute.
        rounds: samples of each contender.
    """

    title: str
    columns: list[str]
    rows: list[Row]
    limit: str | None = None
    note: str = ""
    load: float = dataclasses.field(default_factory=lambda: round(os.getloadavg()[0], 1))
    rounds: int = 1

    @property
    def caption(self) -> str:
        """The text below the table."""
        rounds = f", {self.rounds} rounds" if self.rounds > 1 else ""
        return f"Load average {self.load}{rounds}. {self.note}".strip()


def of_times(case: Case, seconds: Mapping[str, list[float]]) -> Report:
    """Times, ratios, added times and bandwidths, as far as the case has them."""
    limit, first = case.references[0], case.contenders[0].name
    rates = {
        c.name: (c.traffic or case.traffic) / statistics.median(seconds[c.name])
        for c in case.contenders
        if case.traffic
    }
    copy = rates.get("flat copy")

    columns = ["ms", "quartiles", *(f"÷ {reference}" for reference in case.references)]
    columns += ["added ms", f"÷ added by {first}"] * case.added
    columns += ["GB/s"] * bool(rates) + ["of copy"] * (copy is not None)
    rows = []
    for c in case.contenders:
        mine = seconds[c.name]
        ratios = [_over(operator.truediv, mine, seconds[other]) for other in case.references]
        cells = [*_times(mine), *(f"{ratio:.2f}" for ratio in ratios)]
        if case.added:
            blank = c.name == limit
            cells += ["", ""] if blank else _added(mine, seconds[first], seconds[limit])
        if rates:
            cells.append(short(rates[c.name] / 1e9))
        if copy is not None:
            cells.append(f"{rates[c.name] / copy:.0%}")
        samples = [float(f"{second:.4g}") for second in mine]
        rows.append(Row(name=c.name, kind=c.kind, cells=cells, ratio=ratios[0], seconds=samples))
    rounds = len(seconds[first])
    return Report(
        title=case.title, columns=columns, rows=rows, limit=limit, note=case.note, rounds=rounds
    )


def _over(
    combine: Callable[[float, float], float], ones: list[float], others: list[float]
) -> float:
    """The median over the rounds of a ratio or a difference."""
    return statistics.median(combine(one, two) for one, two in zip(ones, others, strict=True))


def _added(mine: list[float], first: list[float], limit: list[float]) -> list[str]:
    """Milliseconds added to the limit, and their ratio to those that the first contender adds."""
    added, unit = (_over(operator.sub, each, limit) for each in (mine, first))
    return [short(added * 1e3), f"{added / unit:.2f}" if unit > 0 else "?"]


def _times(seconds: list[float]) -> list[str]:
    """The median and the quartiles, in milliseconds."""
    samples = seconds if len(seconds) > 1 else 2 * seconds
    low, _, high = statistics.quantiles(samples, n=4)
    return [short(1e3 * statistics.median(seconds)), f"{short(1e3 * low)}–{short(1e3 * high)}"]


def short(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:#.3g}".rstrip(".")


def table(report: Report) -> Table:
    """A table for the terminal, with a row for each contender."""
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


@dataclasses.dataclass(frozen=True)
class Results:
    """The reports of one machine by the name of their case, and everything they depend on."""

    machine: dict[str, str]
    cases: dict[str, Report] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, machine: dict[str, str] | None = None) -> Results:
        """The results in a file if they are of this machine and these versions; else none."""
        if not file.exists():
            return cls(machine or {})
        fields = json.loads(file.read_text(encoding="utf-8"))
        if machine not in (None, fields["machine"]):
            return cls(machine or {})
        reports = {}
        for name, case in fields["cases"].items():
            reports[name] = Report(**case | {"rows": [Row(**row) for row in case["rows"]]})
        return cls(fields["machine"], reports)

    def write(self, file: Path, *, order: Sequence[str]) -> None:
        """Write everything as JSON, with a line for each contender."""
        cases = []
        for name in sorted(self.cases, key=list(order).index):
            fields = dataclasses.asdict(self.cases[name])
            rows = ",\n".join(_json(row) for row in fields.pop("rows"))
            cases.append(f'{_json(name)}: {_json(fields)[:-1]}, "rows": [\n{rows}\n]}}')
        text = f'{{"machine": {_json(self.machine)},\n"cases": {{\n' + ",\n".join(cases) + "\n}}\n"
        file.write_text(text, encoding="utf-8")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
