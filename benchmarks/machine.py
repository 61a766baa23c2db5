"""What a figure depends on: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["machine"]

PACKAGES = (
    "ema",
    "torch",
    "jax",
    "optax",
    "flax",
    "diffusers",
    "ema-pytorch",
    "torch-ema",
    "timm",
    "transformers",
)


def machine(device: str) -> dict[str, str]:
    """The processor, the accelerator, and the versions of what is measured."""
    about = {"processor": _processor(), "cores": str(os.cpu_count())}
    about["threads"] = str(torch.get_num_threads())
    if device == "cuda":
        about |= {"accelerator": torch.cuda.get_device_name(), "CUDA": str(torch.version.cuda)}
    about["Python"] = platform.python_version()
    return about | {package: version(package) for package in PACKAGES}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
