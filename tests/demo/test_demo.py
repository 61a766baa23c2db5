"""The demo: a real run with both backends, and what it says where something is not installed."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import ema
from ema.demo import Demo, compare, data, run
from tests import processes

STEPS = 400


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Demo, str]:
    """A run of a fifth of the default length, and what it printed."""
    out = io.StringIO()
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return run(steps=STEPS, folder=folder, console=Console(file=out, width=100)), out.getvalue()


def test_a_run_of_three_steps_trains_compares_and_draws(tmp_path):
    """Both backends score the network after each step, and their averages agree."""
    demo = run(steps=3, folder=tmp_path, console=Console(file=io.StringIO()))
    assert [each.backend for each in demo.runs] == ["PyTorch", "JAX"]
    for each in demo.runs:
        assert list(each.steps) == [1, 2, 3]
        assert len(each.live) == len(each.averaged) == 3
        assert len(each.params) == 4  # the first weights, and those after each step
    torch_run, jax_run = demo.runs
    assert torch_run.live[0].loss == pytest.approx(jax_run.live[0].loss, rel=1e-3)
    assert demo.comparison is not None
    assert demo.comparison.differing == 0
    assert demo.picture is not None
    assert demo.picture.exists()


@pytest.mark.slow
def test_averaged_weights_beat_live_ones_in_both_backends(finished):
    """Clearly in loss, at the end of the run; and the table shows these numbers."""
    demo, printed = finished
    assert [each.backend for each in demo.runs] == ["PyTorch", "JAX"]
    for each in demo.runs:
        assert each.steps[-1] == STEPS
        live, averaged = each.live[-1], each.averaged[-1]
        assert averaged.loss < 0.9 * live.loss
        assert averaged.accuracy > 0.9
        for score in (live, averaged):
            assert f"{score.loss:.3f}" in printed
            assert f"{score.accuracy:.1%}" in printed
    assert printed.count("averaged │") == printed.count("live     │") == 2
    assert not demo.left_out


@pytest.mark.slow
def test_no_element_of_the_averages_differs(finished):
    """Of the averages after every step of a real training run."""
    demo, printed = finished
    size = sum(values.size for values in demo.runs[0].params[0].values())
    assert demo.comparison == compare.Comparison(elements=STEPS * size, differing=0)
    assert f"0 of {STEPS * size:,} elements" in " ".join(printed.split())


@pytest.mark.slow
def test_both_runs_are_the_same_run_up_to_rounding(finished):
    """Same network, weights, batches and optimizer: the first losses agree, live and averaged."""
    torch_run, jax_run = finished[0].runs
    assert torch_run.steps == jax_run.steps
    for ours, theirs in ((torch_run.live, jax_run.live), (torch_run.averaged, jax_run.averaged)):
        for n in range(3):
            assert ours[n].loss == pytest.approx(theirs[n].loss, rel=1e-3)


@pytest.mark.slow
def test_the_picture_shows_something(finished):
    """A PNG of a sensible size in which curves of three colors were drawn."""
    from matplotlib.image import imread

    demo, printed = finished
    assert demo.picture is not None
    assert demo.picture.name in printed.replace("\n", "")
    assert list(demo.picture.parent.iterdir()) == [demo.picture]
    pixels = imread(demo.picture)
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 1400
    for color in ("#9aa5b1", "#d1495b", "#00798c"):
        rgb = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(pixels[..., :3] - rgb).max(axis=-1) < 0.01).sum() > 1000


ALONE = "import sys; sys.modules |= dict.fromkeys(('datasets', 'torchao'))"
"""Hides what transformers imports where it is installed: for the tests, and not by the demo."""

BLOCKED = """
import sys, warnings
warnings.simplefilter("error")
class Blocker:  # None in sys.modules would do, did scipy not look there for torch
    def find_spec(name, path=None, target=None):
        if name in sys.argv[2:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker)
{ALONE}
from pathlib import Path
import ema
from ema.demo import run
try:
    run(steps=5, folder=Path(sys.argv[1]))
except ema.MissingExtraError as error:
    sys.exit(f"ended: {error}")
""".replace("{ALONE}", ALONE)


@pytest.fixture
def run_without(tmp_path):
    """``run_without(*modules)``: a short run in a process of its own that cannot import these."""

    def start(*modules: str) -> subprocess.CompletedProcess[str]:
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        environment = {
            "COLUMNS": "200",
            "TMPDIR": str(temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),  # torch makes it once it is imported
        }
        command = [sys.executable, "-c", BLOCKED, tmp_path / "out", *modules]
        result = processes.run(command, environment, check=False)
        assert not list(temporary.iterdir())
        return result

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "line", "there"),
    [
        ("jax", "JAX is left out: `jax` is not installed: pip install 'ema[jax]'", "PyTorch"),
        ("torch", "PyTorch is left out: `torch` is not installed: pip install 'ema[torch]'", "JAX"),
        (
            "transformers",
            "PyTorch is left out: `transformers` is not installed: pip install 'ema[transformers]'",
            "JAX",
        ),
    ],
)
def test_without_a_backend_it_runs_the_other_and_says_so(
    run_without, tmp_path, missing, line, there
):
    """One line, the table and the picture of the other one, no comparison, and no warning."""
    result = run_without(missing)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    assert line in result.stdout.splitlines()
    assert f"│ {there}" in result.stdout
    assert "elements" not in result.stdout
    assert (tmp_path / "out" / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
def test_without_matplotlib_only_the_picture_is_missing(run_without, tmp_path):
    """Everything else is printed, and no folder is left empty."""
    result = run_without("matplotlib", "jax")
    assert result.returncode == 0, result.stderr
    line = "the picture is left out: `matplotlib` is not installed: pip install 'ema[demo]'"
    assert line in result.stdout.splitlines()
    assert "│ PyTorch" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        (("torch", "jax"), "no backend is installed: pip install 'ema[transformers,jax]'"),
        (("sklearn",), "`sklearn` is not installed: pip install 'ema[demo]'"),
        (("rich",), "`rich` is not installed: pip install 'ema[cli]'"),
    ],
)
def test_without_what_it_cannot_do_without_it_ends_in_one_line(run_without, missing, line):
    """A missing extra is an error of ours that names it."""
    result = run_without(*missing)
    assert result.returncode == 1
    assert result.stderr.strip() == f"ended: {line}"


@pytest.mark.parametrize(
    ("module", "unloaded"),
    [
        ("ema.demo", ("torch", "jax", "flax", "transformers", "sklearn", "rich", "matplotlib")),
        ("ema.plotting", ("torch", "jax", "matplotlib")),
        ("ema.demo.compare", ("torch", "jax")),
        ("ema.demo.report", ("torch", "jax", "matplotlib")),
        ("ema.demo.torch_run", ("jax", "flax")),
        ("ema.demo.jax_run", ("torch", "transformers")),
    ],
)
def test_no_module_imports_a_framework_that_it_does_not_need(module, unloaded):
    """In a process of its own."""
    code = f"{ALONE}; import {module}; sys.exit(str([m for m in {unloaded} if m in sys.modules] or ''))"
    result = processes.run([sys.executable, "-c", code], check=False)
    assert not result.stderr.strip()


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_must_be_positive(steps, tmp_path):
    with pytest.raises(ema.ArgumentError, match=r"`steps` must be at least 1"):
        run(steps=steps, folder=tmp_path)


def test_a_file_in_place_of_the_folder_is_refused_before_any_training(tmp_path):
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(ema.ArgumentError, match=r"`folder` must be a folder or a new path"):
        run(steps=1, folder=path)


def test_the_comparison_counts_what_differs(monkeypatch):
    """Another decay on one side changes every moving element, and one wrong bit counts as one."""
    rng = np.random.default_rng(0)
    params = [{"a.b": rng.normal(size=7).astype(np.float32)} for _ in range(4)]
    calls = []
    assert compare.compare(params, 0.9, lambda: calls.append(1)).differing == 0
    assert len(calls) == 3

    honest = compare._jax_averages

    def flipped(params, decay):
        for average in honest(params, decay):
            values = average["a.b"].copy()
            values.view(np.int32)[0] ^= 1
            yield {"a.b": values}

    monkeypatch.setattr(compare, "_jax_averages", flipped)
    result = compare.compare(params, 0.9, lambda: None)
    assert result == compare.Comparison(elements=21, differing=3)
    monkeypatch.setattr(compare, "_jax_averages", lambda params, _: honest(params, 0.8))
    assert compare.compare(params, 0.9, lambda: None).differing == 21


def test_the_digits_are_split_once_and_for_all():
    """No image is in both parts; one label in twenty is wrong in training and none held out."""
    from sklearn.datasets import load_digits

    digits, held_out = data.load()
    assert digits.images.shape == (1200, 8, 8, 1)
    assert held_out.images.shape == (597, 8, 8, 1)
    pixels, labels = load_digits(return_X_y=True)
    right = {image.tobytes(): label for image, label in zip(pixels, labels, strict=True)}
    assert len(right) == len(labels)

    def truth(part):
        return [right[(16 * image).astype(np.float64).tobytes()] for image in part.images]

    assert {i.tobytes() for i in digits.images}.isdisjoint(i.tobytes() for i in held_out.images)
    assert (held_out.labels == truth(held_out)).all()
    assert 0.03 < (digits.labels != truth(digits)).mean() < 0.07


def test_batches_are_the_same_on_each_call():
    digits, _ = data.load()
    first, second = (list(data.batches(digits, 3, 8)) for _ in range(2))
    assert len(first) == 3
    for a, b in zip(first, second, strict=True):
        assert a.images.shape == (8, 8, 8, 1)
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
    assert (first[0].images != first[1].images).any()
