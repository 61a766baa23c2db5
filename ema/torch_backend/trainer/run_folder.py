"""The files of the average in the output folder of a run: one in each checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ema.checkpoint import read_state
from ema.checkpoint.paths import index_of
from ema.checkpoint.record import Record
from ema.errors import CheckpointError

__all__ = [
    "belongs_to",
    "checkpoint_folder",
    "checkpoint_folders",
    "discard",
    "file_name",
    "is_incomplete",
    "is_there",
    "last_complete_checkpoint",
    "list_files",
    "model_folder",
    "output_folder",
]

_INCOMPLETE = "checkpoint-is-incomplete.txt"  # the Trainer writes it while it saves on SIGTERM
_FILES = "trainer_files"  # a key in the metadata of the average


def file_name(name: str | None) -> str:
    """The file name of the average of a callback with this name, or without a name."""
    return "ema.safetensors" if name is None else f"ema-{name}.safetensors"


def model_folder(args: TrainingArguments, state: TrainerState, name: str | None) -> Path:
    """The folder for the averaged model at the end of a run."""
    trial = state.trial_name if state.is_hyper_param_search else None
    return output_folder(args) / (trial or "") / ("ema" if name is None else f"ema-{name}")


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder for the checkpoint of the current step, whether or not it was saved yet.

    A hyperparameter search keeps a folder for each trial. The folder is named after the trial's
    ``hp_name``, or else after a number that the Trainer does not tell callbacks. In that case the
    trial with the newest checkpoint of this step is the current one.
    """
    checkpoint = f"checkpoint-{state.global_step}"
    folder = output_folder(args)
    if state.is_hyper_param_search:
        if state.trial_name is not None:
            return folder / state.trial_name / checkpoint
        trials = list(folder.glob(f"run-*/{checkpoint}"))
        if trials:
            return max(trials, key=lambda path: path.stat().st_mtime_ns)
    return folder / checkpoint


def checkpoint_folders(args: TrainingArguments, state: TrainerState, step: int) -> list[Path]:
    """The folders where the checkpoint of ``step`` may be, for a run or a trial of a search.

    On SIGTERM the Trainer saves a trial outside of the folder of that trial.
    """
    checkpoint = f"checkpoint-{step}"
    folder = output_folder(args)
    if not state.is_hyper_param_search:
        return [folder / checkpoint]
    if state.trial_name is not None:
        return [folder / checkpoint, folder / state.trial_name / checkpoint]
    return [folder / checkpoint, *sorted(folder.glob(f"run-*/{checkpoint}"))]


def belongs_to(folder: Path, state: TrainerState) -> bool:
    """Whether ``state`` was read from this checkpoint, not from another one of the same step.

    Two runs with the same step, epoch, number of operations and log look the same.
    """
    try:
        stored = json.loads((folder / TRAINER_STATE_NAME).read_text())
        return all(
            json.dumps(stored[key]) == json.dumps(getattr(state, key))  # NaN equals itself here
            for key in ("global_step", "epoch", "total_flos", "log_history")
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def is_there(file: Path) -> bool:
    """Whether the average exists, in one file or several."""
    return file.exists() or index_of(file).exists()


def is_incomplete(folder: Path) -> bool:
    """Whether the Trainer began a save on SIGTERM in this folder and did not finish it."""
    return (folder / _INCOMPLETE).exists()


def discard(file: Path) -> None:
    """Remove an average that another run has left in a checkpoint that is about to be overwritten.

    The checkpoint must not look complete while it is being overwritten.
    """
    index_of(file).unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def list_files(folder: Path) -> dict[str, str]:
    """Metadata for the average of a checkpoint: the files that the Trainer has written there.

    The list leaves out averages and hidden files, because a later save may replace them. It
    includes the hidden index of a sharded checkpoint, because the shards cannot be read without it.
    It leaves out the mark of an incomplete checkpoint, because the Trainer removes the mark when it
    has finished.
    """
    names = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.name == ".metadata" or not file.name.startswith((".", "ema", _INCOMPLETE))
        if file.is_file()
    )
    return {_FILES: json.dumps(names)}


def last_complete_checkpoint(folder: str | Path, name: str | None = None) -> Path | None:
    """The latest complete checkpoint of a run, for ``resume_from_checkpoint``.

    The Trainer does not save or remove a checkpoint atomically: if the process is killed, a folder
    with some of the files is left. The average is written last and atomically, and it lists the
    other files. So a checkpoint is complete if its average can be read and all listed files exist,
    unless the Trainer's own mark shows an unfinished save on SIGTERM.

    With ``save_total_limit=1`` the Trainer removes the last complete checkpoint before the next one
    is complete. Keep at least two checkpoints, or three with ``load_best_model_at_end``.

    Args:
        folder: ``output_dir`` of the run.
        name: the name of the callback, or None. If the Trainer has several callbacks, name the one
            that writes last: it is the last in the list, or was attached last.

    Returns:
        The folder of the checkpoint, or None if no checkpoint is complete.
    """
    found = [
        (int(step), path)
        for path in Path(folder).glob("checkpoint-*")
        if (step := path.name.removeprefix("checkpoint-")).isdecimal()
    ]
    for _, path in sorted(found, reverse=True):
        if is_incomplete(path) or not (path / TRAINER_STATE_NAME).exists():
            continue
        try:
            record = read_state(path / file_name(name)).record
        except CheckpointError:
            continue
        if _holds_all(path, record):
            return path
    return None


def _holds_all(folder: Path, record: Record) -> bool:
    """Whether all files still exist that the average lists.

    The Trainer resumes silently without some of them, for instance without the optimizer's file.
    """
    try:
        names = json.loads(record.extra.get(_FILES, "[]"))
        return all((folder / name).is_file() for name in names)
    except (OSError, ValueError, TypeError):
        return False


def output_folder(args: TrainingArguments) -> Path:
    """The folder where the Trainer keeps the run."""
    return Path(args.output_dir or "trainer_output")  # the Trainer's own default
