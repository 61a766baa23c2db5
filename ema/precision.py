"""How exactly an average is kept: what both backends are told, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, get_args

from ema import validate
from ema.errors import ArgumentError, warn
from ema.schedules import Schedule
from ema.weights import weight_of

__all__ = ["OnNonfinite", "Precision"]

OnNonfinite = Literal["propagate", "skip", "raise"]

_RESOLUTION = 2.0**-8
"""Of bfloat16: what is added to a number and is less than half of this part of it is lost."""
_LATE = 1_000_000
"""An update after every warmup."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """The arguments of the same names of ``EMAModel`` and ``params_ema``.

    Attributes:
        compensated: keep what each update rounds away in a remainder beside the average.
        stochastic_rounding: of a bfloat16 average, up or down by chance.
        seed: of that chance, in [0, 2**64).
        on_nonfinite: what becomes of an update whose live weights hold NaN or Inf.
    """

    compensated: bool = False
    stochastic_rounding: bool = True
    seed: int = 0
    on_nonfinite: OnNonfinite = "propagate"

    def __post_init__(self) -> None:
        for name in ("compensated", "stochastic_rounding"):
            validate.boolean(name, getattr(self, name))
        if validate.integer("seed", self.seed, minimum=0) >= 1 << 64:
            raise ArgumentError(f"`seed` must be below 2**64, got {self.seed}")
        if self.on_nonfinite not in get_args(OnNonfinite):
            raise ArgumentError(
                f"`on_nonfinite` must be 'propagate', 'skip' or 'raise', got {self.on_nonfinite!r}"
            )

    def check_narrow(self, argument: str, schedules: Iterable[Schedule]) -> None:
        """Look at what does not suit a bfloat16 average, which ``argument`` asks for.

        Raises:
            ArgumentError: it is to be compensated; a remainder would stall as the average does.

        Warns:
            EMAWarning: rounding to nearest, it will not move.
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
