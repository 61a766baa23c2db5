"""Where a Trainer run keeps the average: one file in each of its checkpoint folders."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState, TrainingArguments

from ema.checkpoint import read_state
from ema.errors import CheckpointError

__all__ = ["checkpoint_folder", "file_name", "last_complete_checkpoint", "output_folder"]


def file_name(name: str | None) -> str:
    """The file of the average, or of the average called ``name``."""
    return "ema.safetensors" if name is None else f"ema-{name}.safetensors"


def output_folder(args: TrainingArguments) -> Path:
    """The folder of the run."""
    return Path(args.output_dir or "trainer_output")  # the Trainer's own default


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint of the present step in the output folder of the run.

    A hyperparameter search keeps one run folder a trial; the latest one is the present one.
    """
    checkpoint = f"checkpoint-{state.global_step}"
    folder = output_folder(args)
    if state.is_hyper_param_search:
        trials = list(folder.glob(f"run-*/{checkpoint}"))
        if trials:
            return max(trials, key=lambda path: path.stat().st_mtime_ns)
    return folder / checkpoint


def last_complete_checkpoint(folder: str | Path, name: str | None = None) -> Path | None:
    """The latest checkpoint of a run that was saved to its end, for ``resume_from_checkpoint``.

    The Trainer's own saves are not atomic: a process that is killed leaves a folder with some of
    its files. The average is written last, and whole or not at all, so a checkpoint that holds
    a good one is complete. (With ``save_total_limit=1`` the Trainer removes the last complete one
    before the next is complete: keep two.)

    Args:
        folder: ``output_dir`` of the run.
        name: of the callback, where it has one.

    Returns:
        The folder of the checkpoint, or None where there is none.
    """
    found = [
        (int(step), path)
        for path in Path(folder).glob("checkpoint-*")
        if (step := path.name.removeprefix("checkpoint-")).isdecimal()
    ]
    for _, path in sorted(found, reverse=True):
        try:
            read_state(path / file_name(name))
        except CheckpointError:
            continue
        return path
    return None
