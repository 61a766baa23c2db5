"""Measurements as rows of text: for the terminal, for a file and for the page."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.timing import Case, Measurement

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
    """A case.

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

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Report:
        """Undo ``dataclasses.asdict``."""
        return cls(**{**fields, "rows": [Row(**row) for row in fields["rows"]]})


def of_times(case: Case, measurements: Sequence[Measurement]) -> Report:
    """Times, ratios, added times and bandwidths, as far as the case has them."""
    copy = next((m for m in measurements if m.name == "flat copy"), None)
    unit = next((m.added for m in measurements if m.name == case.unit), None)
    columns = ["ms", "quartiles", *(f"÷ {reference}" for reference in case.references)]
    if case.baseline is not None:
        columns += ["added ms", f"÷ added by {case.unit}"]
    if case.traffic is not None:
        columns += ["GB/s"] + ["of copy"] * (copy is not None)
    rows = []
    for m in measurements:
        cells = _cells(case, m, unit or 0.0)
        if case.traffic is not None:
            cells += _bandwidth(m, copy)
        samples = [float(f"{second:.4g}") for second in m.seconds]
        ratio = m.ratios[case.references[0]]
        rows.append(Row(name=m.name, kind=m.kind, cells=cells, ratio=ratio, seconds=samples))
    return Report(
        title=case.title,
        columns=columns,
        rows=rows,
        limit=case.references[0],
        note=case.note,
        rounds=len(measurements[0].seconds),
    )


def short(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:#.3g}".rstrip(".")


def _cells(case: Case, m: Measurement, unit: float) -> list[str]:
    """Times, ratios and added times."""
    cells = [short(m.median * 1e3), "–".join(short(1e3 * q) for q in m.quartiles)]
    cells += [f"{m.ratios[reference]:.2f}" for reference in case.references]
    if case.baseline is not None:
        cells += ["", ""] if m.name == case.baseline else _added(m.added or 0.0, unit)
    return cells


def _added(added: float, unit: float) -> list[str]:
    return [short(added * 1e3), f"{added / unit:.2f}" if unit > 0 else "?"]


def _bandwidth(m: Measurement, copy: Measurement | None) -> list[str]:
    rate = (m.traffic or 0) / m.median
    cells = [short(rate / 1e9)]
    if copy is not None and copy.traffic:
        cells.append(f"{rate * copy.median / copy.traffic:.0%}")
    return cells


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
        cases = {name: Report.from_dict(case) for name, case in fields["cases"].items()}
        return cls(fields["machine"], cases)

    def write(self, file: Path, *, order: Sequence[str]) -> None:
        """Write everything as JSON, with a line for each contender."""
        cases = []
        for name in sorted(self.cases, key=list(order).index):
            fields = dataclasses.asdict(self.cases[name])
            rows = ",\n".join(_json(row) for row in fields.pop("rows"))
            cases.append(f'{_json(name)}: {_json(fields)[:-1]}, "rows": [\n{rows}\n]}}')
        text = f'{{"machine": {_json(self.machine)},\n"cases": {{\n' + ",\n".join(cases) + "\n}}\n"
        file.write_text(text, encoding="utf-8")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
