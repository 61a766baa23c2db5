"""The reports of a run, in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Report

__all__ = ["Results"]


@dataclasses.dataclass(frozen=True)
class Results:
    """Reports by the name of their case, of one machine.

    Attributes:
        machine: what the figures depend on.
        cases: name to report.
    """

    machine: dict[str, str]
    cases: dict[str, Report]

    @classmethod
    def of(cls, machine: dict[str, str]) -> Results:
        """Nothing yet."""
        return cls(machine, {})

    @classmethod
    def read(cls, file: Path, machine: dict[str, str] | None = None) -> Results:
        """What the file holds, if it is of this machine and these versions; else nothing yet."""
        if not file.exists():
            return cls(machine or {}, {})
        fields = json.loads(file.read_text(encoding="utf-8"))
        if machine not in (None, fields["machine"]):
            return cls(machine, {})
        cases = {name: Report.from_dict(case) for name, case in fields["cases"].items()}
        return cls(fields["machine"], cases)

    def write(self, file: Path, *, order: Sequence[str]) -> None:
        """Everything as JSON, a contender a line."""
        cases = []
        for name in sorted(self.cases, key=list(order).index):
            fields = dataclasses.asdict(self.cases[name])
            rows = ",\n".join(_json(row) for row in fields.pop("rows"))
            cases.append(f'{_json(name)}: {_json(fields)[:-1]}, "rows": [\n{rows}\n]}}')
        text = f'{{"machine": {_json(self.machine)},\n"cases": {{\n' + ",\n".join(cases) + "\n}}\n"
        file.write_text(text, encoding="utf-8")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
