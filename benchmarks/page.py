"""The figures and the pictures in ``docs``, from the files of results.

    python -m benchmarks.page

writes ``docs/benchmarks.md`` anew between the marks of each device that has a file, with a picture and a
table for each case, and draws ``docs/scaling.svg`` from the model behind ``ema plan``.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.pictures import bars, scaling
from benchmarks.report import Report, Results

__all__ = ["DOCS", "markdown", "write_page"]

DOCS = Path(__file__).parents[1] / "docs"
DEVICES = ("cpu", "cuda")


def write_page(folder: Path = DOCS) -> None:
    """Rewrite the marked blocks and the pictures."""
    page = folder / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    for device in DEVICES:
        file = folder / f"benchmarks-{device}.json"
        if not file.exists():
            continue
        results = Results.read(file)
        picture = file.with_suffix(".svg")
        picture.write_text(bars(results.cases.values()), encoding="utf-8")
        text = _between(text, device, markdown(results, picture.name))
    page.write_text(text, encoding="utf-8")


def markdown(results: Results, picture: str) -> str:
    """Machine, picture and tables."""
    about = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    parts = [f"Measured on {about}.", f"![times over the limit, case by case]({picture})"]
    parts += [_section(name, report) for name, report in results.cases.items()]
    return "\n\n".join(parts)


def _section(name: str, report: Report) -> str:
    lines = [f"### `{name}`: {report.title}", ""]
    lines += ["| | " + " | ".join(report.columns) + " |"]
    lines += ["|---|" + "--:|" * len(report.columns)]
    for row in report.rows:
        shown = f"**{row.name}**" if row.kind == "ours" else row.name
        lines.append("| " + " | ".join([shown, *row.cells]) + " |")
    return "\n".join([*lines, "", report.caption])


def _between(text: str, mark: str, block: str) -> str:
    begin, end = f"<!-- {mark}: written by benchmarks/page.py -->", f"<!-- end of {mark} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page has no block between {begin} and {end}")
    return f"{before}{begin}\n\n{block}\n\n{end}{after}"


if __name__ == "__main__":
    write_page()
    scaling(DOCS / "scaling.svg")
