"""The errors and warnings of this library.

Every exception is an :class:`EMAError` and also the builtin that Python users expect in its
place, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CheckpointError",
    "EMAError",
    "EMAWarning",
    "MissingExtraError",
    "ModelError",
    "StateError",
    "difference",
    "listing",
    "shortened",
    "shown",
    "warn",
]


class EMAError(Exception):
    """Base of everything that this library raises."""


class ArgumentError(EMAError, ValueError):
    """An argument has the right type and a value that no computation is defined for."""


class ArgumentTypeError(EMAError, TypeError):
    """An argument has the wrong type."""


class ModelError(EMAError, ValueError):
    """The model cannot be averaged, or it is not the one that the average belongs to."""


class StateError(EMAError, RuntimeError):
    """The call is not possible now, for instance an update while averages are swapped in."""


class CheckpointError(EMAError, ValueError):
    """A saved state is damaged, of an unknown version, or belongs to another model."""


class MissingExtraError(EMAError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class EMAWarning(UserWarning):
    """Something is probably not what the user wanted; the computation goes on."""


def warn(message: str) -> None:
    """Warn with an :class:`EMAWarning` that points at the first line outside of this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, EMAWarning, stacklevel=level)


def _is_ours(module: str) -> bool:
    # contextlib stands between `with ema_model.use_ema():` and our generator, flax between
    # `nnx.EMA(...)` and its `__init__`
    return module.partition(".")[0] in ("ema", "contextlib", "flax")


def shown(value: object) -> str:
    """The first 80 characters of ``repr(value)``, also of integers that Python does not write out."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # more than sys.get_int_max_str_digits()
        if isinstance(value, int):
            return f"an integer of {value.bit_length()} bits"
        return f"a {type(value).__name__} with an integer of very many digits"


def shortened(text: str, longest: int = 200) -> str:
    """``text`` without its middle where it is longer than that: names of files may be very long."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}…{text[-half:]} ({len(text):,} characters)"


def listing(names: Iterable[str], limit: int = 10) -> str:
    """``a, b, c``, quoted, the first ``limit`` of them and how many more there are."""
    names = list(names)
    text = ", ".join(f"`{shortened(name)}`" for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def difference(
    missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str] = ()
) -> str:
    """All that separates two sets of names, in one sentence; empty where nothing does.

    ``mismatched`` holds whole phrases, such as ``"`w` has shape (4,), the state has (8,)"``.
    """
    missing, unexpected, mismatched = list(missing), list(unexpected), list(mismatched)
    parts = []
    if missing:
        parts.append(f"missing: {listing(missing)}")
    if unexpected:
        parts.append(f"unexpected: {listing(unexpected)}")
    if mismatched:
        more = f" and {len(mismatched) - 10} more" if len(mismatched) > 10 else ""
        parts.append("; ".join(mismatched[:10]) + more)
    return "; ".join(parts)
