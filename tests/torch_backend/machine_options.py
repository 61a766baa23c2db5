"""Random options of an ``EMAModel``."""

from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

import ema

__all__ = ["options_of"]

decays = st.one_of(
    st.sampled_from((0.9, 0.5, 0.999, 0.0, 1.0)),
    st.floats(0, 1),
    st.builds(ema.HalfLife, steps=st.floats(0.1, 1e4)),
    st.builds(ema.HalfLifeRampup, steps=st.floats(0.1, 1e4), rampup_ratio=st.floats(0.01, 1)),
    st.builds(ema.InverseGammaWarmup, decay=st.floats(0, 1)),
    st.builds(ema.RampWarmup, decay=st.floats(0, 1)),
    st.builds(ema.DebiasedDecay, decay=st.floats(0, 0.999)),
    st.builds(ema.PowerFunction, gamma=st.floats(0, 20)),
    st.builds(ema.CosineDecay, start=st.floats(0, 1), total_steps=st.floats(1, 40)),
    st.just(ema.UniformAverage()),
)


@st.composite
def options_of(draw: Any, family: str, model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of an ``EMAModel`` of ``model``."""
    parameters = _patterns(name for name, _ in model.named_parameters(remove_duplicate=False))
    buffers = _patterns(name for name, _ in model.named_buffers(remove_duplicate=False))
    chosen = st.sampled_from(parameters) if parameters else st.nothing()
    some = st.one_of(st.none(), st.none(), st.lists(chosen, min_size=1, max_size=3))
    rules = [st.just("copy"), st.just("average")]
    if buffers:
        kinds = st.sampled_from(("copy", "average"))
        rules.append(st.dictionaries(st.sampled_from(buffers), kinds, min_size=1))
    narrow = family == "narrow"
    wide = st.sampled_from((None, None, torch.float32, torch.float64))
    decay = decays
    if family == "several":
        decay = st.dictionaries(st.sampled_from(("a", "b", "c")), decays, min_size=1)
        wide = st.sampled_from((None, torch.float32, torch.float64, torch.bfloat16))
    guards = ("skip", "raise", "propagate") if family == "guarded" else ("propagate",)
    return {
        "decay": draw(decay),
        "update_after_step": draw(st.sampled_from((0, 0, 0, 1, 3))),
        "update_every": draw(st.sampled_from((1, 1, 1, 2, 3))),
        "dtype": torch.bfloat16 if narrow else draw(wide),
        "include": draw(some) if parameters else None,
        "exclude": draw(some) if parameters else None,
        "buffers": draw(st.one_of(*rules)),
        "compensated": family == "compensated",
        "stochastic_rounding": draw(st.booleans()) if narrow else True,
        "seed": draw(st.integers(0, 2**64 - 1)) if narrow else 0,
        "on_nonfinite": draw(st.sampled_from(guards)),
    }


def _patterns(names: Iterator[str]) -> list[str]:
    """Patterns that match some of these names."""
    known = list(names)
    folders = {f"{name.split('.')[0]}.*" for name in known if "." in name}
    return [*known, *sorted(folders), *(["*"] if known else [])]
