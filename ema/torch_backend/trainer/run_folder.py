"""The files of the average in the folders of a Trainer run: one in each checkpoint."""

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

_INCOMPLETE = "checkpoint-is-incomplete.txt"  # the Trainer's, while it saves on SIGTERM
_FILES = "trainer_files"  # in the metadata of the average


def file_name(name: str | None) -> str:
    """The file of the average, or of the average called ``name``."""
    return "ema.safetensors" if name is None else f"ema-{name}.safetensors"


def model_folder(args: TrainingArguments, state: TrainerState, name: str | None) -> Path:
    """Where the averaged model goes at the end of a run."""
    trial = state.trial_name if state.is_hyper_param_search else None
    return output_folder(args) / (trial or "") / ("ema" if name is None else f"ema-{name}")


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint of the present step, which may have been saved or not.

    A hyperparameter search keeps a folder for each trial, called by its ``hp_name`` or else by a
    number that a callback is not told: then the latest one is the present one.
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
    """Where the checkpoint of ``step`` may be, of the run or of a trial of a search.

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
    """Whether ``state`` was read from the checkpoint, and not from one of the same step elsewhere.

    Two runs that have the same step, epoch, operations and log are not told apart.
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
    """Whether there is an average, in one file or several."""
    return file.exists() or index_of(file).exists()


def is_incomplete(folder: Path) -> bool:
    """Whether the Trainer has begun to save there on SIGTERM, and has not finished."""
    return (folder / _INCOMPLETE).exists()


def discard(file: Path) -> None:
    """Remove an average that another run has left: its checkpoint is about to be written over.

    While that goes on, it must not look complete.
    """
    index_of(file).unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def list_files(folder: Path) -> dict[str, str]:
    """Metadata for the average of a checkpoint: the files that the Trainer has put there.

    Without averages and hidden files, which a save that comes after this one may replace, but with
    the index of a sharded checkpoint, without which nothing can be read from that. The mark of an
    incomplete checkpoint goes when the Trainer has finished.
    """
    names = sorted(
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.name == ".metadata" or not file.name.startswith((".", "ema", _INCOMPLETE))
        if file.is_file()
    )
    return {_FILES: json.dumps(names)}


def last_complete_checkpoint(folder: str | Path, name: str | None = None) -> Path | None:
    """The latest checkpoint of a run that holds all its files, for ``resume_from_checkpoint``.

    The Trainer neither saves nor removes a checkpoint in one step: a process that is killed leaves
    a folder with some of its files. The average is written last, and whole or not at all, and
    lists the others, so a checkpoint with a good one and all that it lists is complete, unless the
    Trainer's own mark says that it was saving there on SIGTERM. (With
    ``save_total_limit=1`` the Trainer removes the last complete one before the next is complete:
    keep two, and with ``load_best_model_at_end`` three.)

    Args:
        folder: ``output_dir`` of the run.
        name: of the callback, where it has one; of several, the one that writes last: it stands
            last in the list, or was attached last.

    Returns:
        The folder of the checkpoint, or None where there is none.
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
    """Whether the files are there that were when the average was written.

    Resuming does without some of them, for instance the optimizer's, and says nothing.
    """
    try:
        names = json.loads(record.extra.get(_FILES, "[]"))
        return all((folder / name).is_file() for name in names)
    except (OSError, ValueError, TypeError):
        return False


def output_folder(args: TrainingArguments) -> Path:
    """Where the Trainer keeps the run."""
    return Path(args.output_dir or "trainer_output")  # the Trainer's own default
