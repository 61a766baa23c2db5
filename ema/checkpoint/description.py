"""The text that ``ema inspect`` prints about a file."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from ema.checkpoint.reader import StoredState, open_state
from ema.errors import shortened
from ema.schedules import Schedule

__all__ = ["Description", "describe_file"]

_LONGEST = 300  # characters of a schedule, or of a note
_LONGEST_NAME = 100  # characters of a name; the longest name sets the width of the table
_MOST_NOTES = 100


@dataclasses.dataclass(frozen=True)
class Description:
    """A saved state, and the names of its damaged tensors.

    ``str()`` gives the text that ``ema inspect`` prints.
    """

    state: StoredState
    damaged: tuple[str, ...]

    def __str__(self) -> str:
        record, tensors = self.state.record, self.state.tensors
        elements = sum(math.prod(tensor.shape) for tensor in tensors.values())
        size = sum(tensor.nbytes for tensor in tensors.values())
        files = f" in {len(self.state.files)} files" if len(self.state.files) > 1 else ""
        verdict = f"{len(self.damaged)} DAMAGED" if self.damaged else "all right"
        rows = [
            ("File:", _one_line(str(self.state.place), 4096)),
            (
                "Holds:",
                f"averaged weights (EMA), written by ema {_one_line(record.library_version)}",
            ),
            ("Step:", f"{record.step:,}"),
            ("Updates:", f"{record.count:,}"),
            ("Schedule:", _schedule(record.schedule)),
            ("Update after step:", _known(record.update_after_step)),
            ("Update every:", _known(record.update_every)),
            ("Tensors:", f"{len(tensors):,} with {elements:,} elements, {_bytes(size)}{files}"),
            ("Not averaged:", f"{len(record.not_averaged):,} parameters"),
            ("Digests:", verdict),
        ]
        if record.skipped is not None:
            rows.insert(4, ("Skipped updates:", f"{record.skipped:,}"))
        if record.seed is not None:
            rows.insert(-3, ("Seed:", f"{record.seed}"))
        notes = sorted(record.extra.items())
        rows += [
            (f"{_one_line(key)}:", _one_line(text, _LONGEST)) for key, text in notes[:_MOST_NOTES]
        ]
        if len(notes) > _MOST_NOTES:
            rows.append(("More notes:", f"{len(notes) - _MOST_NOTES:,}"))
        lines = [f"{label:<20} {text}" for label, text in rows]
        names = {name: _one_line(name) for name in tensors}
        width = max(map(len, names.values()), default=0)
        damaged = set(self.damaged)
        for name, tensor in tensors.items():
            mark = "  DAMAGED" if name in damaged else ""
            what = f"{tensor.dtype:<5} {tensor.shape!s:<20} {_bytes(tensor.nbytes):>10}"
            lines.append(f"  {names[name]:<{width}}  {what}{mark}")
        return "\n".join(lines)


def describe_file(path: str | os.PathLike[str]) -> Description:
    """Open a file and compare every tensor with its digest.

    Raises:
        CheckpointError: the file cannot be read, its header is damaged, or `ema` did not write it.
    """
    state = open_state(path)
    damaged = tuple(name for name, tensor in state.tensors.items() if not tensor.intact())
    return Description(state, damaged)


def _one_line(text: str, longest: int = _LONGEST_NAME) -> str:
    """Shorten untrusted text to one line, and escape the characters that would steer a terminal."""
    text = shortened(text, longest)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _schedule(schedule: Schedule | Mapping[str, Any] | None) -> str:
    if schedule is None:
        return "not known"
    if isinstance(schedule, Schedule):
        return _one_line(repr(schedule), _LONGEST)
    fields = ", ".join(f"{key}={value!r}" for key, value in schedule.items() if key != "schedule")
    return _one_line(f"{schedule['schedule']}({fields})", _LONGEST)


def _known(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _bytes(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
