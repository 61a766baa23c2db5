"""Bit equality of the two backends on this machine, in a few seconds.

The averages of both backends, made by :mod:`ema.agreement`, are compared bit by bit at every step, and
with the float64 reference. Where one backend is not installed, the other is compared with the reference
alone.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ema import agreement
from ema.errors import MissingExtraError
from ema.extras import require

__all__ = ["Check", "SelfTest", "run"]


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
    largest_error: float
    """The error that the precision allows."""

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
    """The result of :func:`run`."""

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

    noise = (
        np.random.default_rng(0).normal(size=(agreement.STEPS, agreement.SIZE)).astype(np.float32)
    )
    start = np.random.default_rng(1).normal(size=agreement.SIZE).astype(np.float32)
    checks: list[Check] = []
    for dtype in agreement.DTYPES:
        found = []
        if "jax" in missing:
            walk = np.concatenate([start[None], start + np.cumsum(0.01 * noise, axis=0)])
            params = agreement.rounded(walk, dtype)
        else:
            params, averages = agreement.run_jax(start, noise, dtype)
            found.append(averages)
        if "torch" not in missing:
            found.append(agreement.run_torch(params, dtype))
        checks.extend(_compare(params, dtype, found))
    return SelfTest(
        machine=_machine(),
        versions=_versions(),
        checks=tuple(checks),
        missing=tuple(missing.values()),
    )


def _compare(
    params: agreement.Floats, dtype: str, found: list[dict[agreement.Key, agreement.Floats]]
) -> Iterator[Check]:
    for kind in agreement.KINDS:
        elements = differing = 0
        error = 0.0
        for after, every in agreement.TIMINGS:
            key = (kind, after, every)
            exact = agreement.reference(params, *key)
            elements += exact.size
            for averages in found:
                distance = np.abs(averages[key] - exact).max() / np.abs(exact).max()
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
