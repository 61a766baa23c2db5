"""One sequence of params through both backends and through float64.

The params are those that adamw makes from noisy gradients. They go through ``params_ema`` in a jitted
step and through ``EMAModel`` on the CPU, for every schedule and every precision. The plain recursion of
NumPy in float64 is the reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ema.schedules import EXAMPLES, ConstantDecay, Schedule

__all__ = [
    "DTYPES",
    "KINDS",
    "SIZE",
    "STEPS",
    "TIMINGS",
    "Floats",
    "Key",
    "Kind",
    "reference",
    "rounded",
    "run_jax",
    "run_torch",
]

STEPS = 300
_SHAPES = {"kernel": (24, 32), "bias": (32,)}
SIZE = sum(int(np.prod(shape)) for shape in _SHAPES.values())
"""Elements of the params."""
DTYPES = ("float32", "bfloat16")
"""Dtypes of the params."""
TIMINGS = ((0, 1), (5, 3))
"""Pairs of ``update_after_step`` and ``update_every``."""
_LARGEST_ERROR = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of average that is compared: a schedule in a precision."""

    name: str
    schedule: Schedule
    compensated: bool = False
    narrow: bool = False
    """Kept in bfloat16; otherwise in float32."""
    guarded: bool = False
    """Skips updates with NaN, which a parameter holds in every seventh step."""
    largest_error: float = _LARGEST_ERROR
    """Relative to the largest number of the reference."""


_SLOW = ConstantDecay(decay=0.999)  # rounded to nearest, a bfloat16 average of it stands still
KINDS = (
    *(Kind(name=type(schedule).__name__, schedule=schedule) for schedule in EXAMPLES),
    Kind(name="compensated", schedule=_SLOW, compensated=True, largest_error=1e-7),
    Kind(name="in bfloat16", schedule=_SLOW, narrow=True, largest_error=0.02),
    Kind(name="skipping NaN", schedule=_SLOW, guarded=True),
)
_NAN_EVERY = 7

Floats: TypeAlias = NDArray[np.float32]
Key: TypeAlias = tuple[Kind, int, int]  # kind, update_after_step, update_every


def _keys() -> Iterator[Key]:
    for kind in KINDS:
        for after, every in TIMINGS:
            yield kind, after, every


def reference(params: Floats, kind: Kind, after: int, every: int) -> NDArray[np.float64]:
    """The average after each step, in float64."""
    average = params[0].astype(np.float64)
    trajectory = np.empty((STEPS, SIZE))
    count = 0
    for step in range(1, STEPS + 1):
        if step <= after:
            average = params[step].astype(np.float64)
        elif (step - after) % every == 0 and not (kind.guarded and step % _NAN_EVERY == 0):
            count += 1
            weight = kind.schedule.weight(float(count), every)
            average = average + weight * (params[step] - average)
        trajectory[step - 1] = average
    return trajectory


def run_jax(start: Floats, noise: Floats, dtype: str) -> tuple[Floats, dict[Key, Floats]]:
    """Params before the first and after every step, and the averages after every step."""
    import jax
    import jax.numpy as jnp
    import optax

    from ema.jax_backend import get_params_ema, params_ema

    names = {key: f"{key}" for key in _keys()}
    transforms = {
        key: params_ema(
            key[0].schedule,
            update_after_step=key[1],
            update_every=key[2],
            name=name,
            compensated=key[0].compensated,
            accumulator_dtype=jnp.bfloat16 if key[0].narrow else None,
            on_nonfinite="skip" if key[0].guarded else "propagate",
        )
        for key, name in names.items()
    }
    tx = optax.chain(optax.adamw(1e-2), *(t for key, t in transforms.items() if not key[0].guarded))
    guards = optax.chain(*(t for key, t in transforms.items() if key[0].guarded))

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        params, opt_state, guarded = carry
        grads, is_nan = inputs
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        bias = params["bias"]
        shown = {**params, "bias": jnp.where(is_nan, jnp.full_like(bias, jnp.nan), bias)}
        _, guarded = guards.update(jax.tree.map(lambda _: None, shown), guarded, shown)
        both = (opt_state, guarded)
        averages = {name: get_params_ema(both, name=name) for name in names.values()}
        return (params, opt_state, guarded), (params, averages)

    @jax.jit
    def train(params: Any, grads: Any) -> Any:
        is_nan = jnp.arange(1, STEPS + 1) % _NAN_EVERY == 0
        carry = (params, tx.init(params), guards.init(params))
        return jax.lax.scan(step, carry, (grads, is_nan))[1]

    def flat(tree: Any) -> Floats:
        leaves = [np.asarray(tree[name].astype(jnp.float32)) for name in _SHAPES]
        return np.concatenate([leaf.reshape(STEPS, -1) for leaf in leaves], axis=1)

    # optax's own adam mixes dtypes, which is an error where a user asks for strict promotion
    with jax.default_device(jax.devices("cpu")[0]), jax.numpy_dtype_promotion("standard"):
        first = {n: jnp.asarray(part, dtype) for n, part in _parts(start).items()}
        grads = {n: jnp.asarray(part, dtype) for n, part in _parts(noise).items()}
        params, averages = train(first, grads)
        before = np.concatenate([np.asarray(first[n].astype(jnp.float32)).ravel() for n in _SHAPES])
        return (
            np.concatenate([before[None], flat(params)]),
            {key: flat(averages[name]) for key, name in names.items()},
        )


def run_torch(params: Floats, dtype: str) -> dict[Key, Floats]:
    """The averages after every step of a model whose params take the given values."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more cost more than they bring where the tensors are this small
    try:
        return _torch_averages(params, dtype)
    finally:
        torch.set_num_threads(threads)


def _torch_averages(params: Floats, dtype: str) -> dict[Key, Floats]:
    import torch

    from ema.torch_backend import EMAModel

    model = torch.nn.ParameterDict(
        {
            name: torch.nn.Parameter(torch.tensor(part, dtype=getattr(torch, dtype)))
            for name, part in _parts(params[0]).items()
        }
    )
    ema_models = {
        key: EMAModel(
            model,
            decay=key[0].schedule,
            update_after_step=key[1],
            update_every=key[2],
            compensated=key[0].compensated,
            dtype=torch.bfloat16 if key[0].narrow else None,
            on_nonfinite="skip" if key[0].guarded else "propagate",
        )
        for key in sorted(_keys(), key=lambda key: key[0].guarded)
    }
    averages = {key: np.empty((STEPS, SIZE), np.float32) for key in ema_models}
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for name, part in _parts(params[step]).items():
                model[name].copy_(torch.from_numpy(part))
        for key, ema_model in ema_models.items():
            if key[0].guarded and step % _NAN_EVERY == 0:
                with torch.no_grad():
                    model["bias"].fill_(torch.nan)
            ema_model.update()
            tensors = ema_model.averaged_parameters()
            leaves = [tensors[name].detach().float().numpy().ravel() for name in _SHAPES]
            averages[key][step - 1] = np.concatenate(leaves)
    return averages


def _parts(flat: Floats) -> dict[str, Floats]:
    """Split the last axis into the arrays of ``_SHAPES``."""
    parts, start = {}, 0
    for name, shape in _SHAPES.items():
        stop = start + int(np.prod(shape))
        parts[name] = flat[..., start:stop].reshape(*flat.shape[:-1], *shape)
        start = stop
    return parts


def rounded(params: Floats, dtype: str) -> Floats:
    """Params as float32 numbers that ``dtype`` holds exactly."""
    import torch

    rounded: Floats = torch.from_numpy(params).to(getattr(torch, dtype)).float().numpy()
    return rounded
