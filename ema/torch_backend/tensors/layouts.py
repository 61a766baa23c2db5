"""Detect that tensors have other shapes, strides, dtypes or devices than before."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

try:  # the guards of compiled code use it; all releases since 2.0 have it
    from torch._C._dynamo.guards import TensorGuards  # type: ignore[import-untyped,unused-ignore]
except ImportError:  # pragma: no cover
    TensorGuards = None  # type: ignore[assignment,misc,unused-ignore]

__all__ = ["Layouts"]

_PROPERTIES = (Tensor.size, Tensor.stride, attrgetter("dtype", "device"))


class Layouts:
    """The shape, strides, dtype and device of many tensors, to be compared with at every update.

    One call into C looks at all tensors, in less time than Python takes to ask each for one number.
    It also looks at what does not matter here (modes of autograd and autocast, ``requires_grad``),
    so only its "equal" is final: where it finds a difference, the properties are compared.

    Args:
        tensors: plain ones, each once.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._known = self._properties()
        self._guards = self._guarded()

    def changed(self) -> bool:
        """Whether a tensor has another layout than when this was made."""
        if self._guards is not None and self._guards.check(*self._tensors):
            return False
        if self._properties() != self._known:
            return True
        self._guards = self._guarded()  # fits the modes of now, which the next update will share
        return False

    def _properties(self) -> list[list[Any]]:
        return [list(map(read, self._tensors)) for read in _PROPERTIES]

    def _guarded(self) -> Any:
        if TensorGuards is None or not self._tensors:
            return None
        return TensorGuards(*self._tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
