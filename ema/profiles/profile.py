"""The memory of an average at one moment: the properties that every profile has."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Profile"]

Floats = NDArray[np.float64]


class Profile(Protocol):
    """The parts of a run that an average at ``step`` contains.

    Write ``W_i`` for the params after step ``i`` and ``c_i`` for their share in the average, its
    *response*. The *tail* is ``F_i = Σ_{j≥i} c_j``. The average is then::

        Σ_i c_i · W_i  =  W_0 + Σ_{i≥1} F_i · (W_i − W_{i−1})

    so the tail is the share of the movement of step ``i`` that the average contains. Step ``i``
    takes the time from ``i − 1`` to ``i``.
    """

    @property
    def step(self) -> float:
        """The step at which the average stands, 0 or later."""

    @property
    def initial_share(self) -> float:
        """Share of the initial weights ``W_0`` in the average, in [0, 1]."""

    @property
    def breaks(self) -> tuple[float, ...]:
        """Times above 0 where the tail jumps or bends; between two of them it is smooth."""

    def tail_at(self, times: Floats) -> Floats:
        """The tail at any times above 0, in steps; 0 past ``step``. Step ``i`` is at ``i − ½``."""
