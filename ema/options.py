"""The options that both backends have, validated once and refused in the same words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal, get_args

from ema import validate
from ema.errors import ArgumentError, ArgumentTypeError, listing, shown, warn
from ema.schedules import Schedule, as_schedule
from ema.weights import weight_of

__all__ = [
    "DTYPES",
    "OnNonfinite",
    "Precision",
    "check_dtype",
    "require_name",
    "schedules_by_name",
    "unknown_name",
]

DTYPES = ("float32", "float64", "bfloat16")
"""The dtypes that an average can have."""

OnNonfinite = Literal["propagate", "skip", "raise"]

_RESOLUTION = 2.0**-8
"""Relative spacing of bfloat16 numbers: a summand below half of it is lost."""
_LATE = 1_000_000
"""The number of an update after every warmup."""


def schedules_by_name(
    decay: object, read: Callable[[object, str], Schedule] = as_schedule
) -> dict[str | None, Schedule]:
    """The schedule of each average by its name; a single average has the name None.

    Args:
        decay: a number, a schedule, or a mapping from names to these.
        read: makes a schedule of a value and the name of the argument that it was given as.

    Raises:
        ArgumentError: a decay is outside [0, 1] or NaN, a name is empty, or the mapping is.
        ArgumentTypeError: a decay or a name has the wrong type.
    """
    if not isinstance(decay, Mapping):
        return {None: read(decay, "decay")}
    if not decay:
        raise ArgumentError(f"`decay` must name at least one average, got {decay!r}")
    for name in decay:
        require_name("decay", name)
    return {name: read(each, f"decay[{name!r}]") for name, each in decay.items()}


def require_name(argument: str, name: object) -> None:
    """Make sure that an average can have this name.

    Raises:
        ArgumentError: the name is empty.
        ArgumentTypeError: the name is not a string.
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(
            f"`{argument}` must name averages by strings, got {shown(name)} ({type(name).__name__})"
        )
    if not name:
        raise ArgumentError(f"`{argument}` must not hold an empty name, got ''")


def unknown_name(name: object, names: Collection[str]) -> ArgumentError:
    """The error for a ``name=`` that chooses none of the averages.

    Args:
        name: the value that was given; None if it was not.
        names: the names of the averages; empty for a single average without a name.
    """
    rule = f"be one of {listing(names)}" if names else "not be given for one average"
    return ArgumentError(f"`name` must {rule}, got {shown(name)}")


def check_dtype(argument: str, dtype: str) -> None:
    """Make sure that an average can have the dtype of this name.

    Raises:
        ArgumentError: it cannot.
    """
    if dtype not in DTYPES:
        reason = ""
        if dtype == "float16":
            reason = ": its range ends at 65504, and weights overflow; bfloat16 is as small"
        raise ArgumentError(
            f"`{argument}` must be float32, float64 or bfloat16, got {dtype}{reason}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Precision options, shared by both backends.

    Attributes:
        compensated: keep what each update rounds away in a remainder beside the average.
        stochastic_rounding: round a bfloat16 average up or down by chance.
        seed: of that chance, in [0, 2**64).
        on_nonfinite: what happens to an update whose live weights hold NaN or Inf.

    Raises:
        ArgumentError: an option is out of its range.
        ArgumentTypeError: an option has the wrong type.
    """

    compensated: bool = False
    stochastic_rounding: bool = True
    seed: int = 0
    on_nonfinite: OnNonfinite = "propagate"

    def __post_init__(self) -> None:
        for name in ("compensated", "stochastic_rounding"):
            validate.boolean(name, getattr(self, name))
        validate.integer("seed", self.seed, minimum=0, bits=64)
        if self.on_nonfinite not in get_args(OnNonfinite):
            raise ArgumentError(
                "`on_nonfinite` must be 'propagate', 'skip' or 'raise', got"
                f" {shown(self.on_nonfinite)}"
            )

    def check_narrow(self, argument: str, schedules: Iterable[Schedule]) -> None:
        """Check the options for a bfloat16 average, which the user asked for by ``argument``.

        Raises:
            ArgumentError: ``compensated`` is set; the remainder would stall as the average does.

        Warns:
            EMAWarning: the average is rounded to nearest and will not move.
        """
        if self.compensated:
            raise ArgumentError(
                f"`compensated` must be False where `{argument}` is bfloat16, got True: stochastic"
                " rounding is what keeps such an average moving"
            )
        if self.stochastic_rounding:
            return
        for schedule in schedules:
            try:
                weight = weight_of(schedule, _LATE, 1)
            except Exception:  # noqa: S112 — a schedule of the user's own may end earlier
                continue
            if 0.0 < weight < _RESOLUTION:
                warn(
                    f"a bfloat16 average does not move at decay {1 - weight:.6g}:"
                    " `stochastic_rounding` is False and 1 − decay is below its resolution, 2⁻⁸"
                )
