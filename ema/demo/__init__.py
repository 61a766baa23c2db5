"""The demo: real images, one small network, both backends, live against averaged weights.

Importing it imports no framework; :func:`run` imports the frameworks that are installed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ema import validate
from ema.decay import compute_optimal_decay
from ema.errors import ArgumentError, MissingExtraError
from ema.extras import require

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from ema.demo.compare import Comparison
    from ema.demo.result import Run

__all__ = ["Demo", "run"]

_STEPS = 2000
_NEEDED = {  # backend: its file here, and what that needs: module and the extra that brings it
    "PyTorch": (
        "torch_run",
        {"torch": "torch", "transformers": "transformers", "accelerate": "transformers"},
    ),
    "JAX": ("jax_run", {"jax": "jax", "optax": "jax", "flax": "jax"}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """The result of :func:`run`."""

    runs: Sequence[Run]
    """The runs of the backends that are installed."""
    comparison: Comparison | None
    """None where only one backend is."""
    picture: Path | None
    """None where matplotlib is not installed."""
    left_out: Sequence[str]
    """One line for each thing that was left out, and how to install it."""


def run(
    *, steps: int | None = None, folder: Path = Path("ema-demo"), console: Console | None = None
) -> Demo:
    """Train on handwritten digits with every backend that is installed, on the CPU.

    Prints one table, and in how many elements the averages of the backends differ; writes
    ``loss.png`` into ``folder``. The decay is the recommended one,
    :func:`ema.compute_optimal_decay`.

    Args:
        steps: of each run; by default 2 000, half a minute on two cores.
        folder: for the picture; made if need be.
        console: where to print.

    Raises:
        ArgumentError: ``steps`` is less than 1, or ``folder`` is something else than a folder.
        MissingExtraError: rich or scikit-learn is not installed, or no backend is.
    """
    steps = _STEPS if steps is None else validate.integer("steps", steps, minimum=1)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"`folder` must be a folder or a new path, got the file {folder}")
    require("rich", "cli")
    from rich.console import Console

    from ema.demo import report
    from ema.demo.compare import compare
    from ema.demo.data import load

    console = Console() if console is None else console
    decay = compute_optimal_decay(steps)
    digits, held_out = load()
    report.print_task(console, digits, held_out, steps, decay)

    runs: list[Run] = []
    left_out: list[str] = []
    comparison = None
    with report.progress(console) as progress:
        for backend in _NEEDED:
            task = progress.add_task(f"{backend}: importing", total=steps)
            try:
                train = _trainer(backend)
            except MissingExtraError as error:
                progress.remove_task(task)
                left_out.append(f"{backend} is left out: {error}")
                continue
            progress.update(task, description=f"{backend}: training")
            runs.append(train(digits, held_out, steps, decay, _advance(progress, task)))
        if len(runs) == len(_NEEDED):
            task = progress.add_task("one sequence, both averages", total=steps)
            comparison = compare(runs[0].params, decay, _advance(progress, task))
    if not runs:
        raise MissingExtraError("no backend is installed: pip install 'ema[transformers,jax]'")

    report.print_scores(console, runs, len(held_out.labels))
    if comparison is not None:
        report.print_comparison(console, comparison, runs[0])
    picture = None
    try:
        picture = report.draw(runs, folder / "loss.png")
    except MissingExtraError as error:
        left_out.append(f"the picture is left out: {error}")
    report.print_end(console, picture, left_out)
    return Demo(runs=runs, comparison=comparison, picture=picture, left_out=left_out)


def _trainer(backend: str) -> Callable[..., Run]:
    """The function that trains with a backend.

    Raises:
        MissingExtraError: something that it needs is not installed.
    """
    file, needed = _NEEDED[backend]
    for module, extra in needed.items():
        require(module, extra)
    train: Callable[..., Run] = importlib.import_module(f"ema.demo.{file}").train
    return train


def _advance(progress: Progress, task: TaskID) -> Callable[[], None]:
    return functools.partial(progress.advance, task)
