"""An optimizer and its average in the wrappers of optax, and what these do to a gradient."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

from ema.jax_backend import params_ema
from tests.jax_backend.machine_reference import Group, flat
from tests.jax_backend.machine_trees import Leaf, TreeSpec

__all__ = ["Course", "Wrapper", "wrappers"]

Values = list[Any]
STATIC = ("accumulator_dtype", "seed")
ERRORS = 1
"""Steps with NaN, one after the other, that ``apply_if_finite`` refuses."""

INNER = ("chain", "chain", "named", "masked link", "masked", "inject", "partition", "alone")
OUTER = ("none", "none", "none", "MultiSteps", "apply_if_finite")


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """Where the average stands.

    Attributes:
        outer: what is around the whole chain.
        inner: what is around the average.
        chosen: for each leaf whether it is in the mask, or in the first group.
    """

    outer: str
    inner: str
    chosen: tuple[bool, ...]

    @property
    def traces(self) -> bool:
        """Whether the average is traced in eager calls too."""
        return self.outer != "none"

    def transform(
        self, spec: TreeSpec, options: dict[str, Any], *, averaged: bool = True
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer, with its average or without."""
        chosen = self.chosen[: len(spec.leaves())]

        def links(rate: float) -> list[tuple[str, Any]]:
            return [("sgd", optax.sgd(rate)), *([("average", average())] if averaged else [])]

        def average() -> Any:
            if self.inner == "inject":
                return optax.inject_hyperparams(
                    params_ema, static_args=STATIC, hyperparam_dtype=jnp.float32
                )(**options)
            ours = params_ema(**options)
            if self.inner == "masked link":
                return optax.masked(ours, spec.build(chosen))
            return ours

        def chain(rate: float = 0.5) -> Any:
            if self.inner == "alone":
                return params_ema(**options)
            if self.inner == "named":
                return optax.named_chain(*links(rate))
            return optax.chain(*(link for _, link in links(rate)))

        if self.inner == "partition":
            labels = spec.build(["a" if each else "b" for each in chosen])
            tx = optax.partition({"a": chain(0.5), "b": chain(0.25)}, labels)
        elif self.inner == "masked":
            tx = optax.masked(chain(), spec.build(chosen))
        else:
            tx = chain()
        if self.outer == "MultiSteps":
            return optax.MultiSteps(tx, 2).gradient_transformation()
        if self.outer == "apply_if_finite":
            return optax.apply_if_finite(tx, ERRORS)
        return tx

    def step(self, tx: Any) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
        """One step of training."""

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            if self.inner == "alone":
                halves = jax.tree.map(lambda g: -0.5 * g, grads)
                params = optax.apply_updates(params, halves)
                return params, tx.update(None, state, params)[1]
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    def rate(self, number: int) -> float:
        """What the gradient of a leaf is multiplied with."""
        if self.inner == "masked" and not self.chosen[number]:
            return 1.0
        if self.inner == "partition" and not self.chosen[number]:
            return -0.25
        return -0.5

    def groups(self, leaves: int) -> list[frozenset[int]]:
        """The leaves that each average sees."""
        every = frozenset(range(leaves))
        mine = frozenset(i for i in every if self.chosen[i])
        if self.inner in {"masked", "masked link"}:
            return [mine]
        return [mine, every - mine] if self.inner == "partition" else [every]

    def is_allowed(self, leaves: Sequence[Leaf]) -> bool:
        """Whether each group has something to average, or no array at all."""
        for group in self.groups(len(leaves)):
            arrays = [leaves[i] for i in group if leaves[i].array]
            if arrays and not any(leaf.averaged for leaf in arrays):
                return False
        if self.inner == "alone":
            return self.outer == "none"
        if self.outer == "MultiSteps":  # which accumulates everything in real floating point
            return all(leaf.dtype.kind in "fV" for leaf in leaves if leaf.array)
        return True


@st.composite
def wrappers(draw: Any, leaves: Sequence[Leaf]) -> Wrapper:
    """One that fits a tree of these leaves; without any where what is drawn does not."""
    chosen = draw(st.lists(st.booleans(), min_size=len(leaves), max_size=len(leaves)))
    drawn = Wrapper(draw(st.sampled_from(OUTER)), draw(st.sampled_from(INNER)), tuple(chosen))
    every = (True,) * len(leaves)
    tried = (drawn, dataclasses.replace(drawn, chosen=every), Wrapper("none", drawn.inner, every))
    return next(each for each in tried if each.is_allowed(leaves))


class Course:
    """A run by its description: the live params, the averages, and what wrappers remember.

    Attributes:
        params: for each leaf its value.
        groups: the averages.
        wrapper: where these stand.
    """

    def __init__(
        self, spec: TreeSpec, wrapper: Wrapper, options: dict[str, Any], params: Values
    ) -> None:
        self.leaves, self.names = spec.leaves(), spec.names()
        self.wrapper = wrapper
        self.params = list(params)
        self.options = options
        self.begin()
        self.waiting = [p if p is None else np.zeros_like(p) for p in params]
        self.waited = 0
        self.errors = 0

    def begin(self) -> None:
        """Averages start at the params."""
        self.groups = [
            Group(dict(self.options), here, self.leaves, self.names).begin(self.params)
            for here in self.wrapper.groups(len(self.leaves))
        ]

    def copy(self) -> Course:
        """One that goes its own way."""
        return copy.deepcopy(self)

    def step(self, grads: Values) -> bool:
        """One step; False where it is refused, and nothing has changed."""
        outer = self.wrapper.outer
        if outer == "MultiSteps":
            return self._accumulate(grads)
        if outer == "apply_if_finite":
            finite = all(
                np.isfinite(flat(g)).all()
                for g, leaf in zip(grads, self.leaves, strict=True)
                if leaf.averaged
            )
            self.errors = 0 if finite else self.errors + 1
            if not finite and self.errors <= ERRORS:
                return True
        return self._apply(grads)

    def _accumulate(self, grads: Values) -> bool:
        """The mean of two; what is not due is multiplied with 0, which leaves NaN as it is."""
        self.waited += 1
        with np.errstate(all="ignore"):
            mean = [
                g if g is None else w + (g - w) / np.asarray(self.waited, g.dtype)
                for g, w in zip(grads, self.waiting, strict=True)
            ]
            zeros = [g if g is None else g * np.zeros((), g.dtype) for g in mean]
        if self.waited == 1:
            self.waiting, self.params = mean, self._moved(zeros)
            return True
        self.waiting, self.waited = zeros, 0
        return self._apply(mean)

    def _apply(self, grads: Values) -> bool:
        new = self._moved(grads)
        if any(group.raises(new) for group in self.groups):
            return False
        self.params = new
        for group in self.groups:
            group.update(new)
        return True

    def _moved(self, grads: Values) -> Values:
        """The params after a step of the optimizer."""
        with np.errstate(all="ignore"):
            return [
                np.asarray(
                    (p + np.asarray(self.wrapper.rate(i), p.dtype) * grads[i]).astype(p.dtype)
                )
                if leaf.averaged
                else p
                for i, (leaf, p) in enumerate(zip(self.leaves, self.params, strict=True))
            ]
