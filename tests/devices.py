"""Several devices of JAX on one CPU, on a machine as slow as you like."""

from __future__ import annotations

__all__ = ["several_devices"]

_A_DAY = 86_400


def several_devices(number: int) -> dict[str, str]:
    """What the environment of a process says, so that JAX finds as many devices.

    XLA ends a process in which one device waits for another longer than 40 s, and an operation over
    several processes after some time; on a busy machine neither says that something is wrong.
    """
    flags = {
        "force_host_platform_device_count": number,
        "cpu_collective_call_warn_stuck_timeout_seconds": _A_DAY,
        "cpu_collective_call_terminate_timeout_seconds": _A_DAY,
        "cpu_collective_timeout_seconds": _A_DAY,
    }
    return {
        "XLA_FLAGS": " ".join(f"--xla_{flag}={value}" for flag, value in flags.items()),
        "JAX_PLATFORMS": "cpu",
    }
