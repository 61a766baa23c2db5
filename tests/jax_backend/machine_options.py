"""Random options of ``params_ema``, and the decays that its schedules have by their description."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import ema

__all__ = ["decay_at", "decays", "options_of"]

decays = st.one_of(
    st.sampled_from((0.9, 0.5, 0.25, 0.999, 0.0, 1.0)),
    st.floats(0, 1),
    st.builds(ema.HalfLife, steps=st.floats(0.1, 1e4)),
    st.builds(ema.HalfLifeRampup, steps=st.floats(0.1, 1e4), rampup_ratio=st.floats(0.01, 1)),
    st.builds(ema.InverseGammaWarmup, decay=st.floats(0, 1)),
    st.builds(ema.RampWarmup, decay=st.floats(0, 1)),
    st.builds(ema.ExponentialRamp, decay=st.floats(0, 1), tau=st.floats(0.5, 100)),
    st.builds(ema.DebiasedDecay, decay=st.floats(0, 0.999)),
    st.builds(ema.PowerFunction, gamma=st.floats(0, 20)),
    st.builds(ema.CosineDecay, start=st.floats(0, 1), total_steps=st.floats(1, 40)),
    st.just(ema.UniformAverage()),
)

_FORMULAS: dict[str, Callable[[Any, int, int], float]] = {
    "HalfLife": lambda s, n, k: 2 ** (-k / s.steps),
    "HalfLifeRampup": lambda s, n, k: 2 ** (-k / min(s.steps, s.rampup_ratio * n * k)),
    "InverseGammaWarmup": lambda s, n, k: max(
        s.min_decay, min(s.decay, 1 - (1 + n / s.inv_gamma) ** -s.power)
    ),
    "RampWarmup": lambda s, n, k: min(s.decay, (1 + n) / (10 + n)),
    "ExponentialRamp": lambda s, n, k: s.decay * (1 - math.exp(-n / s.tau)),
    "DebiasedDecay": lambda s, n, k: 1 - (1 - s.decay) / (1 - s.decay**n),
    "PowerFunction": lambda s, n, k: (1 - 1 / n) ** (s.gamma + 1),
    "CosineDecay": lambda s, n, k: (
        s.end
        - (s.end - s.start) * math.sin(math.pi / 2 * (1 - min((n * k - k) / s.total_steps, 1))) ** 2
    ),
    "UniformAverage": lambda s, n, k: 1 - 1 / n,
}
"""The table of the documentation: the decay at update n, with ``update_every`` k."""


def decay_at(decay: Any, update: int, every: int) -> float:
    """The decay of an update, from 1, as the documentation says; in float64."""
    if isinstance(decay, float):
        return decay
    return float(_FORMULAS[type(decay).__name__](decay, update, every))


@st.composite
def options_of(draw: Any, family: str) -> dict[str, Any]:
    """Keyword arguments of ``params_ema``."""
    options = {
        "decay": draw(decays),
        "update_after_step": draw(st.sampled_from((0, 0, 0, 1, 3))),
        "update_every": draw(st.sampled_from((1, 1, 1, 2, 3))),
    }
    if draw(st.booleans()):
        options["name"] = "mean"
    if family == "several":
        options.pop("name", None)
        options["decay"] = draw(
            st.dictionaries(st.sampled_from(("a", "b", "c")), decays, min_size=1)
        )
        options["compensated"] = draw(st.booleans())
    if family == "narrow":
        options["accumulator_dtype"] = jnp.bfloat16
        options["seed"] = draw(st.integers(0, 2**64 - 1))
        options["stochastic_rounding"] = draw(st.sampled_from((True, True, False)))
    elif draw(st.booleans()):
        wide = (np.float32, np.float64) if family == "double" else (np.float32,)
        options["accumulator_dtype"] = draw(st.sampled_from(wide))
    if family == "compensated" or (family == "double" and draw(st.booleans())):
        options["compensated"] = True
    if family == "guarded":
        options["on_nonfinite"] = draw(st.sampled_from(("skip", "skip", "raise", "propagate")))
        options["update_after_step"] = draw(st.sampled_from((0, 0, 1)))
        options["compensated"] = draw(st.booleans())
    return options
