"""The memory of an average: the part of the run that it remembers, and how to build another one.

:func:`profile_of` describes the average of any schedule: the share of each past step (the
*response*), the part of each step's movement that it contains (the *tail*), and the mean age and
relative width of its memory::

    profile = ema.profiles.profile_of(0.999, 10_000)
    profile.mean_age, profile.relative_width

:func:`posthoc_coefficients` makes a power-function average of any width out of stored ones.
:func:`combine` does so for any sources and any target. Everything is float64 and needs no framework.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv:2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

from ema.profiles.closed import Checkpoint, ExponentialProfile, PowerProfile, UniformProfile
from ema.profiles.coefficients import posthoc_coefficients
from ema.profiles.combination import Combination, combine
from ema.profiles.profile import Profile
from ema.profiles.runs import Run, RunProfile, profile_of
from ema.widths import LARGEST_STD, gamma_from_std, std_from_gamma

__all__ = [
    "LARGEST_STD",
    "Checkpoint",
    "Combination",
    "ExponentialProfile",
    "PowerProfile",
    "Profile",
    "Run",
    "RunProfile",
    "UniformProfile",
    "combine",
    "gamma_from_std",
    "posthoc_coefficients",
    "profile_of",
    "std_from_gamma",
]
