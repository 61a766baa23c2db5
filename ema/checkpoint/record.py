"""The facts about an average, and the metadata of a file that hold them.

Everything is a string, since the container holds only strings; a value beyond a word or a number
is JSON. Keys that this version does not know are kept as they are.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ema
from ema.checkpoint.container import load_json
from ema.errors import CheckpointError, EMAError, shown
from ema.schedule_descriptions import describe_schedule, known_schedule
from ema.schedules import Schedule

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "KIND",
    "OWN_KEYS",
    "Record",
    "names_from_json",
    "record_from",
    "record_to",
    "to_json",
]

FORMAT = "ema"
FORMAT_VERSION = 1
KIND = "ema"
"""The kind of the tensors: averages. Version 1 has no other kind."""

OWN_KEYS = (
    "format",
    "format_version",
    "library_version",
    "kind",
    "dtype",
    "step",
    "count",
    "schedule",
    "update_after_step",
    "update_every",
    "not_averaged",
    "complex128",
    "parts",
    "skipped",
    "seed",
    "digests",
    "header_digest",
)
"""All keys of version 1; any other is the user's or a later version's."""

_Value = TypeVar("_Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """How far an average is and how it was made.

    Attributes:
        step: calls of ``update``, or steps of the chain.
        count: updates made by them.
        schedule: of a class of this library, or the description of one of another class; None
            where the writer did not know it or could not describe it.
        update_after_step: likewise.
        update_every: likewise.
        not_averaged: names of the model's other parameters.
        skipped: updates that were due and not made, since the live weights were not finite; None
            if nothing looked for them.
        seed: of stochastic rounding; None where nothing was rounded so.
        parts: for each tensor that is not simply the average of its own name: the label of the
            average (empty: the only one), the part of it (``"average"``, ``"remainder"``) and the
            canonical name.
        extra: further metadata, string by string.
        library_version: of the library that wrote the file.
    """

    step: int
    count: int
    schedule: Schedule | Mapping[str, Any] | None = None
    update_after_step: int | None = None
    update_every: int | None = None
    not_averaged: tuple[str, ...] = ()
    skipped: int | None = None
    seed: int | None = None
    parts: Mapping[str, tuple[str, str, str]] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, str] = dataclasses.field(default_factory=dict)
    library_version: str = dataclasses.field(default_factory=lambda: ema.__version__)

    def __post_init__(self) -> None:
        for name, minimum, bits, needed in (
            ("step", 0, 63, True),
            ("count", 0, 63, True),
            ("update_after_step", 0, 63, False),
            ("update_every", 1, 63, False),
            ("skipped", 0, 63, False),
            ("seed", 0, 64, False),
        ):
            value = getattr(self, name)
            if value is None and not needed:
                continue
            if type(value) is not int or not minimum <= value < 1 << bits:
                raise CheckpointError(
                    f"`{name}` must be an integer in [{minimum}, 2**{bits}), got {shown(value)}"
                )
        if self.count > self.step:
            raise CheckpointError(f"`count` must not exceed `step` ({self.step}), got {self.count}")
        if not isinstance(self.library_version, str):
            raise CheckpointError(
                f"`library_version` must be a string, got {shown(self.library_version)}"
            )
        _check_names(self.not_averaged)
        _check_parts(self.parts)
        if not isinstance(self.extra, Mapping):
            raise CheckpointError(f"metadata must be a mapping, got {shown(self.extra)}")
        for key, text in self.extra.items():
            if not isinstance(key, str) or not isinstance(text, str):
                raise CheckpointError(f"metadata must be strings, got {shown(key)}: {shown(text)}")
            if key in OWN_KEYS:
                raise CheckpointError(f"metadata must not be called {key!r}: the format has it")


def _check_names(names: object) -> None:
    if not isinstance(names, tuple) or not all(map(_is_str, names)):
        raise CheckpointError(f"`not_averaged` must be a tuple of names, got {shown(names)}")


def _check_parts(parts: object) -> None:
    if not isinstance(parts, Mapping):
        raise CheckpointError(f"`parts` must be a mapping, got {shown(parts)}")
    for key, part in parts.items():
        strings = isinstance(part, tuple) and len(part) == 3 and all(map(_is_str, (key, *part)))
        if not strings:
            raise CheckpointError(f"`parts` of {shown(key)} must be three strings")


def record_to(record: Record) -> dict[str, str]:
    """The metadata of a record, without what only the tensors tell (dtype, digests)."""
    own = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": record.library_version,
        "kind": KIND,
        "step": str(record.step),
        "count": str(record.count),
        "schedule": to_json(describe_schedule(record.schedule)),
        "update_after_step": to_json(record.update_after_step),
        "update_every": to_json(record.update_every),
        "not_averaged": to_json(sorted(record.not_averaged)),
    }
    for name in ("skipped", "seed"):
        if (value := getattr(record, name)) is not None:
            own[name] = str(value)
    if record.parts:
        own["parts"] = to_json({key: list(part) for key, part in sorted(record.parts.items())})
    return {**own, **dict(sorted(record.extra.items()))}


def record_from(metadata: Mapping[str, str]) -> Record:
    """The inverse of :func:`record_to`.

    Raises:
        CheckpointError: another program wrote the file, or it is of a newer version or damaged.
    """
    if metadata.get("format") != FORMAT or "format_version" not in metadata:
        raise CheckpointError(
            "this safetensors file was not written by `ema`: `ema convert` (ema.convert) reads those"
            " of others"
        )
    version = _integer("format_version", metadata["format_version"])
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"it has format version {version}, this library reads {FORMAT_VERSION}: update `ema`"
        )
    if metadata.get("kind") != KIND:
        raise CheckpointError(f"`kind` must be {KIND!r}, got {metadata.get('kind')!r:.80}")

    def field(name: str, read: Callable[[str, str], _Value]) -> _Value:
        if name not in metadata:
            raise CheckpointError(f"the metadata lacks {name!r}")
        return read(name, metadata[name])

    return Record(
        step=field("step", _integer),
        count=field("count", _integer),
        schedule=field("schedule", _schedule),
        update_after_step=field("update_after_step", _optional_integer),
        update_every=field("update_every", _optional_integer),
        not_averaged=field("not_averaged", names_from_json),
        skipped=field("skipped", _integer) if "skipped" in metadata else None,
        seed=field("seed", _integer) if "seed" in metadata else None,
        parts=field("parts", _parts) if "parts" in metadata else {},
        extra={key: text for key, text in metadata.items() if key not in OWN_KEYS},
        library_version=field("library_version", lambda _, text: text),
    )


def to_json(value: Any) -> str:
    """Compact JSON; floats come back as they were."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _from_json(name: str, text: str) -> Any:
    # any JSON value, through the reader for objects, which bounds and checks
    return load_json(b'{"value":' + text.encode(errors="replace") + b"}", f"`{name}`")["value"]


def _integer(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text):
        raise CheckpointError(f"`{name}` must be a number, got {text!r:.80}")
    return int(text)


def _optional_integer(name: str, text: str) -> int | None:
    return None if text == "null" else _integer(name, text)


def _schedule(name: str, text: str) -> Schedule | dict[str, Any] | None:
    description = _from_json(name, text)
    if description is None:
        return None
    try:
        return known_schedule(description)
    except EMAError as error:
        raise CheckpointError(f"`{name}` does not describe a schedule: {error}") from None


def names_from_json(name: str, text: str) -> tuple[str, ...]:
    """A list of strings, no two alike."""
    names = _from_json(name, text)
    if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
        raise CheckpointError(f"`{name}` must be a list of names, got {text!r:.80}")
    if len(set(names)) != len(names):
        raise CheckpointError(f"`{name}` holds a name twice: {text!r:.80}")
    return tuple(names)


def _parts(name: str, text: str) -> Any:
    """Lists as tuples; the record checks the rest."""
    parts = _from_json(name, text)
    if not isinstance(parts, dict):
        return parts
    return {key: tuple(part) if isinstance(part, list) else part for key, part in parts.items()}


def _is_str(value: object) -> bool:
    return isinstance(value, str)
