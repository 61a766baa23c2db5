"""Several callbacks of one Trainer: each needs its own file, and only one may evaluate."""

from __future__ import annotations

import weakref

from transformers import TrainerState

from ema.errors import StateError

__all__ = ["claim"]


class _Run:
    """The claims of the latest run, whose callbacks begin one after the other."""

    def __init__(self) -> None:
        self.state: weakref.ref[TrainerState] | None = None
        self.taken: set[str] = set()


_run = _Run()


def claim(state: TrainerState, file: str, *, evaluates: bool) -> None:
    """Claim a file name, and perhaps the evaluations, of the run that begins.

    Args:
        state: the state of the run; the Trainer makes a new one for each run.
        file: the name of the callback's file in every checkpoint.
        evaluates: whether the callback shows its average to evaluations.

    Raises:
        StateError: another callback of the run has claimed the file or the evaluations.
    """
    if _run.state is None or _run.state() is not state:
        _run.state, _run.taken = weakref.ref(state), set()
    if file in _run.taken:
        raise StateError(
            f"two EMACallbacks of this Trainer write {file}: give one of them a name,"
            " EMACallback(..., name='slow')"
        )
    if evaluates and "evaluation" in _run.taken:
        raise StateError(
            "two EMACallbacks of this Trainer have eval_with_ema=True: only one may have it"
        )
    _run.taken |= {file, "evaluation"} if evaluates else {file}
