"""Several callbacks of one Trainer: each needs a file of its own, and one may evaluate."""

from __future__ import annotations

import weakref

from transformers import TrainerState

from ema.errors import StateError

__all__ = ["claim"]


class _Run:
    """The names that the callbacks of the latest run have taken; they begin one after the other."""

    def __init__(self) -> None:
        self.state: weakref.ref[TrainerState] | None = None
        self.taken: set[str] = set()


_run = _Run()


def claim(state: TrainerState, file: str, *, evaluates: bool) -> None:
    """Take a file of the checkpoints, and maybe the evaluations, of the run that begins.

    Args:
        state: of the run, which makes a new one for each beginning.
        file: in every checkpoint.
        evaluates: whether evaluations see the average.

    Raises:
        StateError: another callback of the run has taken it.
    """
    if _run.state is None or _run.state() is not state:
        _run.state, _run.taken = weakref.ref(state), set()
    if file in _run.taken:
        raise StateError(
            f"two EMACallbacks of this Trainer write {file}: give one of them a name,"
            " EMACallback(..., name='slow')"
        )
    if evaluates and "evaluation" in _run.taken:
        raise StateError("two EMACallbacks of this Trainer have eval_with_ema=True: one can")
    _run.taken |= {file, "evaluation"} if evaluates else {file}
