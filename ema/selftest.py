"""Bit equality of the two backends on this machine, in a few seconds.

One sequence of parameters, as adamw makes it from noisy gradients, goes through ``EMAModel`` on the
CPU and through ``params_ema`` in a jitted step; the averages of every step are compared bit by bit,
for every schedule and every precision. The plain recursion of NumPy in float64 stands beside them,
and alone where a backend is not installed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ema.errors import MissingExtraError
from ema.extras import require
from ema.schedules import (
    ConstantDecay,
    CosineDecay,
    DebiasedDecay,
    ExponentialRamp,
    HalfLife,
    HalfLifeRampup,
    InverseGammaWarmup,
    PowerFunction,
    RampWarmup,
    Schedule,
    UniformAverage,
)

__all__ = ["Check", "SelfTest", "run"]

_STEPS = 300
_SHAPES = {"kernel": (24, 32), "bias": (32,)}
_SIZE = sum(int(np.prod(shape)) for shape in _SHAPES.values())
_DTYPES = ("float32", "bfloat16")
_LARGEST_ERROR = 1e-5
_SCHEDULES: tuple[Schedule, ...] = (
    ConstantDecay(decay=0.99),
    HalfLife(steps=50),
    HalfLifeRampup(steps=50, rampup_ratio=0.1),
    InverseGammaWarmup(decay=0.98),
    RampWarmup(decay=0.95),
    ExponentialRamp(decay=0.98, tau=30),
    DebiasedDecay(decay=0.99),
    PowerFunction.from_std(0.1),
    CosineDecay(start=0.9, total_steps=_STEPS),
    UniformAverage(),
)
_SETTINGS = ((0, 1), (5, 3))  # update_after_step, update_every


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """What an average of its own line is: a schedule in a precision; float32 unless narrow."""

    name: str
    schedule: Schedule
    compensated: bool = False
    narrow: bool = False
    guarded: bool = False
    """Skips what is not finite: a parameter is NaN in every seventh step."""
    largest_error: float = _LARGEST_ERROR


_SLOW = ConstantDecay(decay=0.999)  # rounded to nearest, a bfloat16 average of it stands still
_KINDS = (
    *(_Kind(name=type(schedule).__name__, schedule=schedule) for schedule in _SCHEDULES),
    _Kind(name="compensated", schedule=_SLOW, compensated=True, largest_error=1e-7),
    _Kind(name="in bfloat16", schedule=_SLOW, narrow=True, largest_error=0.02),
    _Kind(name="skipping NaN", schedule=_SLOW, guarded=True),
)
_NAN_EVERY = 7

Floats: TypeAlias = NDArray[np.float32]
Key: TypeAlias = tuple[_Kind, int, int]  # kind, update_after_step, update_every


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One kind of average of params of one dtype, over all steps and settings."""

    name: str
    """Class of the schedule, or the precision."""
    dtype: str
    """Dtype of the params."""
    elements: int
    """Elements compared, in the averages of all steps."""
    differing: int | None
    """Elements whose bits differ between the backends; None where one is not installed."""
    error: float
    """max |difference| / max |reference| against float64, the larger one of the backends."""
    largest_error: float = _LARGEST_ERROR
    """That the precision allows."""

    @property
    def right(self) -> bool:
        """Whether the average is what it should be."""
        return self.error <= self.largest_error

    @property
    def passed(self) -> bool:
        """Whether no bit differs and the average is right."""
        return not self.differing and self.right


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What :func:`run` found."""

    machine: str
    versions: Mapping[str, str]
    checks: tuple[Check, ...]
    missing: tuple[str, ...]
    """One line for each backend that is not installed, and how to install it."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        elements = sum(check.elements for check in self.checks)
        if wrong := [check.error for check in self.checks if not check.right]:
            return f"an average is wrong: it is off by {max(wrong):.1e} from float64"
        if self.missing:
            return f"{elements} elements are right; nothing to compare bits with"
        differing = sum(check.differing or 0 for check in self.checks)
        text = f"{differing} of {elements} elements differ between PyTorch and JAX"
        if differing:
            text += ": bit equality needs a CPU with fused multiply-add that both frameworks use"
        return text


def run() -> SelfTest:
    """Compare the backends that are installed.

    Raises:
        MissingExtraError: neither is.
    """
    missing: dict[str, str] = {}
    for extra, modules in (("torch", ["torch"]), ("jax", ["jax", "optax"])):
        try:
            for module in modules:
                require(module, extra)
        except MissingExtraError as error:
            missing[extra] = str(error)
    if len(missing) == 2:
        raise MissingExtraError("neither torch nor jax is installed: pip install 'ema[torch,jax]'")

    noise = np.random.default_rng(0).normal(size=(_STEPS, _SIZE)).astype(np.float32)
    start = np.random.default_rng(1).normal(size=_SIZE).astype(np.float32)
    checks: list[Check] = []
    for dtype in _DTYPES:
        found = []
        if "jax" in missing:
            walk = np.concatenate([start[None], start + np.cumsum(0.01 * noise, axis=0)])
            params = _rounded(walk, dtype)
        else:
            params, averages = _run_jax(start, noise, dtype)
            found.append(averages)
        if "torch" not in missing:
            found.append(_run_torch(params, dtype))
        checks.extend(_compare(params, dtype, found))
    return SelfTest(
        machine=_machine(),
        versions=_versions(),
        checks=tuple(checks),
        missing=tuple(missing.values()),
    )


def _keys() -> Iterator[Key]:
    for kind in _KINDS:
        for after, every in _SETTINGS:
            yield kind, after, every


def _compare(params: Floats, dtype: str, found: list[dict[Key, Floats]]) -> Iterator[Check]:
    for kind in _KINDS:
        elements = differing = 0
        error = 0.0
        for after, every in _SETTINGS:
            key = (kind, after, every)
            reference = _reference(params, *key)
            elements += reference.size
            for averages in found:
                distance = np.abs(averages[key] - reference).max() / np.abs(reference).max()
                error = max(error, float(distance) if np.isfinite(distance) else np.inf)
            bits = [averages[key].view(np.int32) for averages in found]
            differing += int(np.count_nonzero(bits[0] != bits[-1]))
        yield Check(
            name=kind.name,
            dtype=dtype,
            elements=elements,
            differing=differing if len(found) == 2 else None,
            error=error,
            largest_error=kind.largest_error,
        )


def _reference(params: Floats, kind: _Kind, after: int, every: int) -> NDArray[np.float64]:
    """The average after each step, in float64."""
    average = params[0].astype(np.float64)
    trajectory = np.empty((_STEPS, _SIZE))
    count = 0
    for step in range(1, _STEPS + 1):
        if step <= after:
            average = params[step].astype(np.float64)
        elif (step - after) % every == 0 and not (kind.guarded and step % _NAN_EVERY == 0):
            count += 1
            weight = kind.schedule.weight(float(count), every)
            average = average + weight * (params[step] - average)
        trajectory[step - 1] = average
    return trajectory


def _run_jax(start: Floats, noise: Floats, dtype: str) -> tuple[Floats, dict[Key, Floats]]:
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
        is_nan = jnp.arange(1, _STEPS + 1) % _NAN_EVERY == 0
        carry = (params, tx.init(params), guards.init(params))
        return jax.lax.scan(step, carry, (grads, is_nan))[1]

    def flat(tree: Any) -> Floats:
        leaves = [np.asarray(tree[name].astype(jnp.float32)) for name in _SHAPES]
        return np.concatenate([leaf.reshape(_STEPS, -1) for leaf in leaves], axis=1)

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


def _run_torch(params: Floats, dtype: str) -> dict[Key, Floats]:
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
    averages = {key: np.empty((_STEPS, _SIZE), np.float32) for key in ema_models}
    for step in range(1, _STEPS + 1):
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


def _rounded(params: Floats, dtype: str) -> Floats:
    import torch

    rounded: Floats = torch.from_numpy(params).to(getattr(torch, dtype)).float().numpy()
    return rounded


def _machine() -> str:
    """System, architecture and, where the system tells it, the model of the CPU."""
    text = f"{platform.system()} {platform.machine()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    if model := fields.get("model name"):
        text += f", {model}"
    if "flags" in fields:
        has_fma = "fma" in fields["flags"].split()
        text += ", with fused multiply-add" if has_fma else ", WITHOUT fused multiply-add"
    return text


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for package in ("ema", "numpy", "torch", "jax", "jaxlib", "optax"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
