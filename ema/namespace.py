"""The functions that a schedule may use, for Python floats, NumPy arrays and JAX tracers."""

from __future__ import annotations

import math
from typing import Any, Protocol

__all__ = ["FLOAT_MATH", "FloatMath", "Namespace", "Scalar"]

Scalar = Any  # a Python float, a NumPy array or a JAX tracer


class Namespace(Protocol):
    """The functions that schedules need: ``numpy``, ``jax.numpy`` and :class:`FloatMath` fit."""

    def exp(self, x: Scalar, /) -> Scalar: ...
    def expm1(self, x: Scalar, /) -> Scalar: ...
    def log1p(self, x: Scalar, /) -> Scalar: ...
    def sin(self, x: Scalar, /) -> Scalar: ...
    def minimum(self, x: Scalar, y: Scalar, /) -> Scalar: ...
    def maximum(self, x: Scalar, y: Scalar, /) -> Scalar: ...


class FloatMath:
    """The namespace for Python floats."""

    exp = staticmethod(math.exp)
    expm1 = staticmethod(math.expm1)
    sin = staticmethod(math.sin)
    minimum = staticmethod(min)
    maximum = staticmethod(max)

    @staticmethod
    def log1p(x: float) -> float:
        """``log(1 + x)``, −∞ at −1, where ``math.log1p`` raises."""
        return -math.inf if x == -1.0 else math.log1p(x)


FLOAT_MATH: Namespace = FloatMath()
