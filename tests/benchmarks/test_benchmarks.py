"""Every benchmark runs at a tiny size, and its arithmetic is right; no time is asserted."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

from benchmarks import checkouts
from benchmarks import timing as measuring
from benchmarks.cases import REPORTED, TIMED, run, times
from benchmarks.cases.peaks import of_process, peaks_of
from benchmarks.page import DOCS, markdown, scaling, write_page
from benchmarks.peers import SWAPS, UPDATES, swap_of, timm_utils, update_of
from benchmarks.report import Report, Results, Row, of_times, short
from benchmarks.setting import Setting, machine
from benchmarks.timing import Case, Contender, Effort, measure
from tests import processes

TINY = Setting(size="tiny")


@pytest.mark.parametrize("name", TIMED)
def test_a_case_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the cases of files keep theirs
    report = times(name, TINY)
    assert {"ours", "limit"} <= {row.kind for row in report.rows}
    assert [row.ratio for row in report.rows if row.name == report.limit] == [1.0]
    for row in report.rows:
        assert len(row.cells) == len(report.columns)
        assert len(row.seconds) == 1


@pytest.mark.parametrize(("make", "names"), [(update_of, UPDATES), (swap_of, SWAPS)])
def test_every_contender_can_be_asked_for_its_memory(make, names):
    assert "ema" in names
    for name in names:
        _, parameters, peaks = peaks_of(make, name, TINY)
        assert parameters < 10_000
        assert len(peaks) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*REPORTED} - {"kernels"}))
def test_a_case_that_measures_by_itself_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = run(name, TINY)
    assert any(row.kind == "ours" for row in report.rows)
    assert all(len(row.cells) == len(report.columns) for row in report.rows)


def test_the_kernels_can_be_imported_without_a_gpu():
    module = importlib.import_module("benchmarks.cases.kernels")
    assert callable(module.kernels_of_sizes)


def test_the_peak_of_a_process_is_that_since_the_last_reset():
    """64 MiB that come and go are seen once."""
    memory, size = of_process(), 64 * 2**20
    memory.reset()
    before = memory.peak()
    torch.ones(size, dtype=torch.uint8)
    assert size * 0.9 <= memory.peak() - before <= size * 1.2
    memory.reset()
    assert memory.peak() - before <= size * 0.2


@pytest.fixture
def lasting(monkeypatch):
    """``lasting(name, seconds)``: contenders on a clock of their own."""
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def make(name, *seconds, **options):
        each = itertools.cycle(seconds)
        return Contender(name=name, call=lambda: now.__setitem__(0, now[0] + next(each)), **options)

    return make


def test_ratios_added_times_and_bandwidths(lasting):
    """Against the limit and the first contender, and in bytes a second."""
    case = Case(
        title="a case",
        contenders=[
            lasting("ema", 3.0, kind="ours"),
            lasting("peer", 6.0),
            lasting("flat copy", 1.0, kind="limit", traffic=4_000_000_000),
        ],
        references=["flat copy", "ema"],
        added=True,
        traffic=6_000_000_000,
    )
    effort = Effort(rounds=9, seconds=1000, sample=0.01)
    report = of_times(case, measure(case.contenders, effort))
    assert report.columns[2:] == [
        *("÷ flat copy", "÷ ema", "added ms", "÷ added by ema", "GB/s", "of copy")
    ]
    assert [row.cells[2:] for row in report.rows] == [
        ["3.00", "1.00", "2000", "1.00", "2.00", "50%"],
        ["6.00", "2.00", "5000", "2.50", "1.00", "25%"],
        ["1.00", "0.33", "", "", "4.00", "100%"],
    ]
    assert [row.ratio for row in report.rows] == [3.0, 6.0, 1.0]


def test_rounds_fit_into_the_time_but_are_seven(lasting):
    for seconds, rounds in ((1, 7), (20, 10), (1000, 40)):
        effort = Effort(rounds=40, seconds=seconds, sample=0.01)
        assert len(measure([lasting("a", 2.0)], effort)["a"]) == rounds


def test_without_a_length_each_sample_is_one_call(lasting):
    """The first call is the first sample."""
    assert measure([lasting("a", 5.0, 3.0, 2.0)], Effort(rounds=2)) == {"a": [5.0, 3.0]}


def test_calls_that_are_short_are_repeated(lasting):
    """A sample has as many calls as fill its length, and shows the mean of them."""
    finished = []
    contender = lasting("a", 0.001, finish=lambda: finished.append(True))
    (seconds,) = measure([contender], Effort(rounds=3, seconds=1000, sample=0.01)).values()
    assert seconds == pytest.approx(3 * [0.001])
    warm_up, a_round = [1, 1, 1, 1, 1], [1, 10]
    assert len(finished) == len(warm_up) + 3 * len(a_round)
    assert measuring.time.perf_counter() == pytest.approx(0.001 * sum(warm_up + 3 * a_round))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.01234, "0.0123"), (1.0, "1.00"), (12.34, "12.3"), (123.4, "123"), (54321.0, "54321")],
)
def test_numbers_have_three_digits(number, text):
    assert short(number) == text


def test_an_accelerator_gets_what_fits(monkeypatch):
    """1.5 B elements, or as many as the free memory holds of all contenders."""
    cuda = Setting(device="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**12, 10**12))
    assert cuda.elements(1000, copies=12) == 1_500_000_000
    assert Setting(device="cuda", size="quick").elements(1000, copies=12) == 187_500_000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (48 * 10**6, 10**12))
    assert cuda.elements(1000, copies=12) == 900_000
    assert Setting().elements(1000, copies=12) == 1000


@pytest.fixture
def report():
    rows = [
        Row(name="ema", kind="ours", cells=["1.00"], ratio=1.25, seconds=[1e-3]),
        Row(name="peer", kind="peer", cells=["3.00"], ratio=3.75, seconds=[3e-3]),
    ]
    return Report(title="one update: 5 M", columns=["ms"], rows=rows, limit="copy", load=0.5)


def test_results_come_back_and_are_added_to(tmp_path, report):
    """A case that is measured again replaces itself; another machine starts anew."""
    file, order = tmp_path / "results.json", ["first", "second"]
    Results({"cores": "2"}, {"second": report}).write(file, order=order)
    results = Results.read(file, {"cores": "2"})
    assert results.cases == {"second": report}
    results.cases["first"] = report
    results.write(file, order=order)
    assert [*Results.read(file).cases] == order
    assert Results.read(file, {"cores": "3"}).cases == {}
    assert Results.read(tmp_path / "none.json", {"cores": "3"}).cases == {}


def test_the_page_gets_table_and_picture_between_its_marks(tmp_path, report):
    """The rest of the page stays, and to write it twice changes nothing."""
    page = tmp_path / "benchmarks.md"
    marks = ["<!-- cpu: written by benchmarks/page.py -->", "<!-- end of cpu -->"]
    page.write_text("\n".join(["before", *marks, "after"]))
    Results({"cores": "2"}, {"case": report}).write(
        tmp_path / "benchmarks-cpu.json", order=["case"]
    )
    write_page(tmp_path)
    text, picture = page.read_text(), (tmp_path / "benchmarks-cpu.svg").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert "| **ema** | 1.00 |" in text
    assert {"ema", "peer", "1.25", "3.75"} <= {x.text for x in ET.fromstring(picture).iter()}
    write_page(tmp_path)
    assert (page.read_text(), (tmp_path / "benchmarks-cpu.svg").read_text()) == (text, picture)
    page.write_text("no marks")
    with pytest.raises(ValueError, match="no block between"):
        write_page(tmp_path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_page_in_the_docs_is_that_of_its_results(device):
    """Nobody has changed a figure by hand."""
    file = DOCS / f"benchmarks-{device}.json"
    if file.exists():
        block = markdown(Results.read(file), file.with_suffix(".svg").name)
        assert f"\n\n{block}\n\n" in (DOCS / "benchmarks.md").read_text()
        assert file.with_suffix(".svg").stat().st_size <= 200_000


def test_timm_is_the_real_one_and_no_torchvision_stays_behind():
    module = timm_utils()
    assert Path(module.__file__).parent == Path(find_spec("timm").origin).parent / "utils"
    assert "timm" in UPDATES
    if find_spec("torchvision") is None:
        assert "torchvision" not in sys.modules


@pytest.mark.slow
def test_the_command_measures_in_new_processes(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--size", "tiny", "--device", "cpu"]
    file = tmp_path / "results.json"
    cases = ["--cases", "many-small", "memory-swap", "--json", file]
    done = processes.run([*command, *cases], cwd=DOCS.parent)
    assert "bare foreach" in done.stdout
    fields = json.loads(file.read_text())
    assert [*fields["cases"]] == ["many-small", "memory-swap"]
    assert fields["machine"] == machine("cpu") | {"threads": fields["machine"]["threads"]}


def test_the_picture_of_scaling_is_drawn_from_the_plan(tmp_path):
    scaling(tmp_path / "scaling.svg")
    texts = {x.text for x in ET.parse(tmp_path / "scaling.svg").iter()}
    assert texts


@pytest.mark.parametrize(
    ("number", "low", "high"), [(1, 0, 0), (5, 0, 4), (7, 0, 6), (9, 1, 7), (15, 3, 11)]
)
def test_the_interval_of_a_median_is_that_of_the_sign_test(number, low, high):
    """The published ranks for 95 %, counted from 0; too few values give all of them."""
    assert checkouts.interval([float(n) for n in reversed(range(number))]) == (low, high)


@pytest.mark.slow
def test_a_checkout_is_timed_in_a_process_of_its_own(monkeypatch):
    """Each case once, with the ``ema`` of that folder; another one is refused."""
    seconds = checkouts.times_of(checkouts.NEW)
    assert len(seconds) == 9
    assert all(second > 0 for second in seconds.values())
    monkeypatch.setattr(checkouts.json, "loads", lambda _: {"ema": "/elsewhere/ema/__init__.py"})
    with pytest.raises(RuntimeError, match="must hold the `ema` that it imports"):
        checkouts.times_of(checkouts.NEW)
