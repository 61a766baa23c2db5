"""What ``ema inspect`` says about a file."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from ema.checkpoint.reader import StoredState, open_state
from ema.schedules import Schedule

__all__ = ["Description", "describe_file"]

_LONGEST = 300  # characters of a schedule of the user's own


@dataclasses.dataclass(frozen=True)
class Description:
    """A state in a file, and which of its tensors are not what was written.

    ``str`` of it is the text of ``ema inspect``.
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
            ("File:", _shown(str(self.state.place))),
            ("Holds:", f"averaged weights (EMA), written by ema {_shown(record.library_version)}"),
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
        rows += [(f"{_shown(key)}:", _shown(text)) for key, text in sorted(record.extra.items())]
        lines = [f"{label:<20} {text}" for label, text in rows]
        width = max((len(_shown(name)) for name in tensors), default=0)
        for name, tensor in tensors.items():
            mark = "  DAMAGED" if name in self.damaged else ""
            what = f"{tensor.dtype:<5} {tensor.shape!s:<20} {_bytes(tensor.nbytes):>10}"
            lines.append(f"  {_shown(name):<{width}}  {what}{mark}")
        return "\n".join(lines)


def describe_file(path: str | os.PathLike[str]) -> Description:
    """Open a file and compare every tensor with its digest.

    Raises:
        CheckpointError: it cannot be read, its header is damaged, or it is none of ours.
    """
    state = open_state(path)
    damaged = tuple(name for name, tensor in state.tensors.items() if not tensor.intact())
    return Description(state, damaged)


def _shown(text: str) -> str:
    """Text of anybody's on one line, with what would steer a terminal written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _schedule(schedule: Schedule | Mapping[str, Any] | None) -> str:
    if schedule is None:
        return "not known"
    if isinstance(schedule, Schedule):
        return repr(schedule)
    fields = ", ".join(f"{key}={value!r}" for key, value in schedule.items() if key != "schedule")
    text = _shown(f"{schedule['schedule']}({fields})")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _known(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _bytes(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
