"""Bit equality of the two backends on this machine, in a few seconds.

One sequence of parameters, as adamw makes it from noisy gradients, goes through ``EMAModel`` on the
CPU and through ``params_ema`` in a jitted step; the averages of every step are compared bit by bit,
for every schedule. The plain recursion of NumPy in float64 stands beside them, and alone where a
backend is not installed.
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
    DebiasedDecay(decay=0.99),
    PowerFunction.from_std(0.1),
    CosineDecay(start=0.9, total_steps=_STEPS),
    UniformAverage(),
)
_SETTINGS = ((0, 1), (5, 3))  # update_after_step, update_every

Floats: TypeAlias = NDArray[np.float32]
Key: TypeAlias = tuple[Schedule, int, int]  # schedule, update_after_step, update_every


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One schedule with params of one dtype, over all steps and settings."""

    name: str
    """Class of the schedule."""
    dtype: str
    """Dtype of the params; the average is float32."""
    elements: int
    """Elements compared, in the averages of all steps."""
    differing: int | None
    """Elements whose bits differ between the backends; None where one is not installed."""
    error: float
    """max |Δ| / max |reference| against float64, the larger one of the backends."""

    @property
    def passed(self) -> bool:
        """Whether no bit differs and the average is right."""
        return not self.differing and self.error <= _LARGEST_ERROR


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
        error = max(check.error for check in self.checks)
        if not error <= _LARGEST_ERROR:
            return f"an average is wrong: it is off by {error:.1e} from float64"
        if self.missing:
            return f"{elements} elements are right to {error:.1e}; nothing to compare bits with"
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
    for schedule in _SCHEDULES:
        for after, every in _SETTINGS:
            yield schedule, after, every


def _compare(params: Floats, dtype: str, found: list[dict[Key, Floats]]) -> Iterator[Check]:
    for schedule in _SCHEDULES:
        elements = differing = 0
        error = 0.0
        for after, every in _SETTINGS:
            key = (schedule, after, every)
            reference = _reference(params, *key)
            elements += reference.size
            for averages in found:
                distance = np.abs(averages[key] - reference).max() / np.abs(reference).max()
                error = max(error, float(distance) if np.isfinite(distance) else np.inf)
            bits = [averages[key].view(np.int32) for averages in found]
            differing += int(np.count_nonzero(bits[0] != bits[-1]))
        yield Check(
            name=type(schedule).__name__,
            dtype=dtype,
            elements=elements,
            differing=differing if len(found) == 2 else None,
            error=error,
        )


def _reference(params: Floats, schedule: Schedule, after: int, every: int) -> NDArray[np.float64]:
    """The average after each step, in float64."""
    average = params[0].astype(np.float64)
    trajectory = np.empty((_STEPS, _SIZE))
    for step in range(1, _STEPS + 1):
        count, between = divmod(step - after, every)
        if step <= after:
            average = params[step].astype(np.float64)
        elif between == 0:
            weight = schedule.weight(float(count), every)
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
    transforms = [
        params_ema(schedule, update_after_step=after, update_every=every, name=name)
        for (schedule, after, every), name in names.items()
    ]
    tx = optax.chain(optax.adamw(1e-2), *transforms)

    def step(carry: Any, grads: Any) -> tuple[Any, Any]:
        params, opt_state = carry
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        averages = {name: get_params_ema(opt_state, name=name) for name in names.values()}
        return (params, opt_state), (params, averages)

    @jax.jit
    def train(params: Any, grads: Any) -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    def flat(tree: Any) -> Floats:
        leaves = [np.asarray(tree[name].astype(jnp.float32)) for name in _SHAPES]
        return np.concatenate([leaf.reshape(_STEPS, -1) for leaf in leaves], axis=1)

    with jax.default_device(jax.devices("cpu")[0]):
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

    from ema.torch_backend import EMAModel

    model = torch.nn.ParameterDict(
        {
            name: torch.nn.Parameter(torch.tensor(part, dtype=getattr(torch, dtype)))
            for name, part in _parts(params[0]).items()
        }
    )
    ema_models = {
        key: EMAModel(model, decay=key[0], update_after_step=key[1], update_every=key[2])
        for key in _keys()
    }
    averages = {key: np.empty((_STEPS, _SIZE), np.float32) for key in ema_models}
    for step in range(1, _STEPS + 1):
        with torch.no_grad():
            for name, part in _parts(params[step]).items():
                model[name].copy_(torch.from_numpy(part))
        for key, ema_model in ema_models.items():
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
