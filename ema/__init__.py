"""Exponential moving averages of model weights, equal to the last bit in PyTorch and JAX.

``import ema`` imports no framework: the names of a backend are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ema.decay import (
    compute_optimal_decay,
    decay_from_half_life,
    half_life_from_decay,
    scale_decay,
    window_from_decay,
)
from ema.errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    EMAError,
    EMAWarning,
    MissingExtraError,
    ModelError,
    StateError,
)
from ema.info import EMADescription, describe_ema, print_ema_info
from ema.plan.model import Plan, plan_ema
from ema.schedules import SCHEDULES, Schedule

if TYPE_CHECKING:
    from ema import profiles as profiles
    from ema.converting.convert import convert as convert
    from ema.jax_backend import ParamsEMAState as ParamsEMAState
    from ema.jax_backend import get_params_ema as get_params_ema
    from ema.jax_backend import load_params_ema as load_params_ema
    from ema.jax_backend import params_ema as params_ema
    from ema.jax_backend import save_params_ema as save_params_ema
    from ema.schedules import ConstantDecay as ConstantDecay
    from ema.schedules import CosineDecay as CosineDecay
    from ema.schedules import DebiasedDecay as DebiasedDecay
    from ema.schedules import ExponentialRamp as ExponentialRamp
    from ema.schedules import HalfLife as HalfLife
    from ema.schedules import HalfLifeRampup as HalfLifeRampup
    from ema.schedules import InverseGammaWarmup as InverseGammaWarmup
    from ema.schedules import PowerFunction as PowerFunction
    from ema.schedules import RampWarmup as RampWarmup
    from ema.schedules import UniformAverage as UniformAverage
    from ema.torch_backend import EMACallback as EMACallback
    from ema.torch_backend import EMAModel as EMAModel

__version__ = "0.1.0"

_BACKEND_OF = {
    "EMACallback": "ema.torch_backend",
    "EMAModel": "ema.torch_backend",
    "ParamsEMAState": "ema.jax_backend",
    "convert": "ema.converting",
    "get_params_ema": "ema.jax_backend",
    "load_params_ema": "ema.jax_backend",
    "params_ema": "ema.jax_backend",
    "save_params_ema": "ema.jax_backend",
}

# The names of the backends are left out: `from ema import *` must not need both frameworks.
__all__ = [  # noqa: PLE0604  # strings, one for each row of the table
    *SCHEDULES,
    "ArgumentError",
    "ArgumentTypeError",
    "CheckpointError",
    "EMADescription",
    "EMAError",
    "EMAWarning",
    "MissingExtraError",
    "ModelError",
    "Plan",
    "Schedule",
    "StateError",
    "compute_optimal_decay",
    "decay_from_half_life",
    "describe_ema",
    "half_life_from_decay",
    "plan_ema",
    "print_ema_info",
    "scale_decay",
    "window_from_decay",
]

globals().update(SCHEDULES)


def __getattr__(name: str) -> Any:
    if name == "profiles":
        return importlib.import_module("ema.profiles")
    if name in _BACKEND_OF:
        return getattr(importlib.import_module(_BACKEND_OF[name]), name)
    raise AttributeError(f"module 'ema' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_BACKEND_OF, "profiles"})
