"""Buffers that averaging would break; ``buffers="average"`` leaves them alone.

A rule that names such a buffer (``buffers={"*.weight_u": "average"}``) averages it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ema.torch_backend.tensors.names import is_of

__all__ = ["FirstLook"]

_QUANTIZERS = (  # home and name of the classes that watch values or imitate their rounding
    ("torch.ao.quantization.observer", "ObserverBase"),
    ("torch.ao.quantization.fake_quantize", "FakeQuantizeBase"),
    ("torchao.quantization.pt2e.observer", "ObserverBase"),
    ("torchao.quantization.pt2e.fake_quantize", "FakeQuantizeBase"),
    ("torchao.quantization.qat.fake_quantizer", "FakeQuantizerBase"),
)


class FirstLook:
    """Decides about each buffer when it is first seen, and keeps to that.

    A mask holds infinities from the start. A statistic that becomes infinite later is a matter for
    ``on_nonfinite``.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str | None] = {}

    @property
    def left_alone(self) -> dict[str, str]:
        """Canonical name to reason, for each buffer that must not be averaged."""
        return {name: reason for name, reason in self._reasons.items() if reason is not None}

    def allows(self, name: str, buffer: Tensor, owner: nn.Module) -> bool:
        """Whether a buffer of floating point may be averaged.

        The first look reads its values, so an accelerator is waited for.

        Args:
            name: the canonical name.
            buffer: the tensor, which has values.
            owner: the module that has it.
        """
        if name not in self._reasons:
            self._reasons[name] = _reason(name.rpartition(".")[2], buffer, owner)
        return self._reasons[name] is None


def _reason(key: str, buffer: Tensor, owner: nn.Module) -> str | None:
    """Why a buffer must not be averaged; None where it may be."""
    if is_of(owner, "torch.nn.utils.parametrizations", "_SpectralNorm"):
        return "a vector of a spectral norm, which must keep its length of 1"
    if key in _vectors_of_old_spectral_norm(owner):
        return "a vector of a spectral norm, which must keep its length of 1"
    if any(is_of(owner, *home_and_name) for home_and_name in _QUANTIZERS):
        return f"a range or scale of {type(owner).__name__}"
    # float8 is refused later, and PyTorch cannot tell whether it is finite
    if buffer.dtype.itemsize > 1 and not bool(torch.isfinite(buffer).all()):
        return "it held infinities or NaN when it was first seen"
    return None


def _vectors_of_old_spectral_norm(module: nn.Module) -> Iterator[str]:
    """Names of the buffers of ``torch.nn.utils.spectral_norm``, which works by a hook."""
    for hook in module._forward_pre_hooks.values():
        if is_of(hook, "torch.nn.utils.spectral_norm", "SpectralNorm"):
            yield from (f"{hook.name}_u", f"{hook.name}_v")  # type: ignore[attr-defined]
