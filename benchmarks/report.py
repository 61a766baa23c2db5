"""What was measured, as rows of text: for the terminal, for a file and for the page."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from benchmarks.measure import Case, Measurement

__all__ = ["Report", "Row", "of_times", "short"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One contender.

    Attributes:
        name: of the contender.
        kind: ``"ours"``, ``"peer"`` or ``"limit"``.
        cells: one a column.
        ratio: to the limit, for the picture.
        seconds: every sample.
    """

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
        limit: what ``Row.ratio`` is to.
        note: what the table should show.
        load: how busy the machine was, the load average of a minute.
        rounds: samples of each.
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
        """Below the table."""
        rounds = f", {self.rounds} rounds" if self.rounds > 1 else ""
        return f"Load average {self.load}{rounds}. {self.note}".strip()

    @classmethod
    def from_dict(cls, fields: dict[str, object]) -> Report:
        """Of ``dataclasses.asdict``."""
        return cls(**{**fields, "rows": [Row(**row) for row in fields["rows"]]})


def of_times(case: Case, measurements: Sequence[Measurement]) -> Report:
    """Times, ratios, added times and bandwidths, as far as the case has them."""
    copy = next((m for m in measurements if m.name == "flat copy"), None)
    columns = ["ms", "quartiles", *(f"÷ {reference}" for reference in case.references)]
    if case.baseline is not None:
        columns += ["added ms", f"÷ added by {case.unit}"]
    if case.traffic is not None:
        columns += ["GB/s"] + ["of copy"] * (copy is not None)
    unit = next((m.added for m in measurements if m.name == case.unit), None)
    rows = []
    for m in measurements:
        cells = [short(m.median * 1e3), "–".join(short(1e3 * q) for q in m.quartiles)]
        cells += [f"{m.ratios[reference]:.2f}" for reference in case.references]
        if m.name == case.baseline:
            cells += ["", ""]
        elif case.baseline is not None:
            cells += [short(m.added * 1e3), f"{m.added / unit:.2f}" if unit > 0 else "?"]
        if case.traffic is not None:
            cells += _bandwidth(m, copy)
        ratio = m.ratios[case.references[0]]
        samples = [float(f"{second:.4g}") for second in m.seconds]
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


def _bandwidth(m: Measurement, copy: Measurement | None) -> list[str]:
    rate = m.traffic / m.median
    cells = [short(rate / 1e9)]
    if copy is not None:
        cells.append(f"{rate * copy.median / copy.traffic:.0%}")
    return cells
