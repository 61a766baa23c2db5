"""Rules: steps of training, eager, compiled, scanned, vmapped, differentiated and in a shard_map."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

import ema
from tests.jax_backend.machine_base import Base, picks, seeds

__all__ = ["Training"]

COMPILED = ("jit", "donated", "scan", "vmap", "grad", "shard_map")
MEMBERS = 2
bad_steps = st.sampled_from((1, 2, 0, 3, 5, 6, 12))


class Training(Base):
    """Every way through an update."""

    def train(self, context: str, many: list[list[Any]], member: int = 0) -> None:
        """Steps with these gradients."""
        self.count(context)
        type(self).steps += len(many)
        trees = [self.spec.build(grads) for grads in many]
        traced = context != "eager" or self.wrapper.traces
        if traced and self.course.groups[0].guard == "raise":
            with pytest.raises(ema.ArgumentError, match="must not be 'raise' where"):
                self.run("jit" if context == "vmap" else context, trees[:1])
            return
        if context == "vmap":
            self.train_members(many, member)
            return
        for tree, grads in zip(trees, many, strict=True) if context == "eager" else ():
            if not self.course.step(grads):
                with pytest.raises(ema.StateError, match="hold NaN or Inf"):
                    self.step(self.params, self.state, tree)
                return
            self.params, self.state = self.step(self.params, self.state, tree)
            self.check(self.params, self.state, self.course)
        if context == "eager":
            return
        for grads, (params, state) in zip(many, self.run(context, trees), strict=True):
            assert self.course.step(grads)
            self.check(params, state, self.course)
        self.params, self.state = params, state

    def run(self, context: str, trees: list[Any]) -> list[tuple[Any, Any]]:
        """Params and state after each step."""
        if context == "scan":
            return self.scanned(trees)
        function = self.of(context)
        params, state, history = self.params, self.state, []
        for tree in trees:
            params, state = function(params, state, tree)
            history.append((params, state))
            if context == "donated":  # the next step takes the memory of these
                params, state = jax.tree.map(jnp.copy, (params, state))
        return history

    def scanned(self, trees: list[Any]) -> list[tuple[Any, Any]]:
        params, state = jax.tree.map(jnp.asarray, (self.params, self.state))
        _, seen = self.of("scan")(params, state, stacked(trees))
        return [jax.tree.map(lambda leaf, i=i: leaf[i], seen) for i in range(len(trees))]

    def train_members(self, many: list[list[Any]], member: int) -> None:
        """Independent members from the same start; the run goes on with one of them."""
        others = [[flipped(g) for g in grads] for grads in many]
        courses = [self.course, self.course.copy()]
        both = jax.tree.map(
            lambda leaf: jnp.stack([jnp.asarray(leaf)] * MEMBERS), (self.params, self.state)
        )
        for grads, other in zip(many, others, strict=True):
            tree = stacked([self.spec.build(grads), self.spec.build(other)])
            both = self.of("vmap")(*both, tree)
            for i, (course, each) in enumerate(zip(courses, (grads, other), strict=True)):
                assert course.step(each)
                self.check(*jax.tree.map(lambda leaf, i=i: leaf[i], both), course)  # type: ignore[call-arg]
        self.course = courses[member]
        self.params, self.state = jax.tree.map(lambda leaf: leaf[member], both)

    def of(self, context: str) -> Any:
        """The step in this context, compiled once for a transform."""
        if context not in self.compiled:
            self.compiled[context] = getattr(self, f"in_{context}")()
        return self.compiled[context]

    def in_jit(self) -> Any:
        return jax.jit(self.step)

    def in_donated(self) -> Any:
        return jax.jit(self.step, donate_argnums=1)

    def in_vmap(self) -> Any:
        return jax.jit(jax.vmap(self.step))

    def in_scan(self) -> Any:
        def body(carry: Any, tree: Any) -> Any:
            carry = self.step(*carry, tree)
            return carry, carry

        return jax.jit(lambda params, state, trees: jax.lax.scan(body, (params, state), trees))

    def in_grad(self) -> Any:
        """The step inside a function that is differentiated."""

        def total(scale: Any, params: Any, state: Any, tree: Any) -> Any:
            tree = jax.tree.map(lambda g: g * scale.astype(g.dtype), tree)
            params, state = self.step(params, state, tree)
            leaves = [leaf for leaf in jax.tree.leaves(state) if is_real(leaf)]
            sums = [jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves]
            return sum(sums, jnp.float32(0)), (params, state)

        differentiated = jax.jit(jax.value_and_grad(total, has_aux=True))

        def run(params: Any, state: Any, tree: Any) -> Any:
            (_, result), _ = differentiated(jnp.float32(1), params, state, tree)
            return result

        return run

    def in_shard_map(self) -> Any:
        mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])
        whole = jax.sharding.PartitionSpec()
        return jax.jit(jax.shard_map(self.step, mesh=mesh, in_specs=whole, out_specs=whole))

    def several(self, seed: int, steps: int, bad: int) -> list[list[Any]]:
        """Gradients of so many steps; of a guarded average the ``bad`` ones, by bits, hold NaN or Inf.

        Params that hold them already are healed, most of the times.
        """
        many = [self.grads(seed + 7 * k) for k in range(steps)]
        finite = all(
            np.isfinite(p.astype(np.complex64)).all() for p in self.course.params if p is not None
        )
        if not finite and seed % 4:
            self.live_values_change(seed=seed, pick=0)
        for k, grads in enumerate(many):
            if self.may_spoil and bad >> k & 1:
                self.spoil(grads, np.nan if bad >> k & 2 else np.inf, seed)
        return many

    @property
    def may_spoil(self) -> bool:
        """Inside MultiSteps, XLA decides whether NaN times 0 is 0."""
        return self.family == "guarded" and self.wrapper.outer != "MultiSteps"

    def spoil(self, grads: list[Any], value: float, seed: int) -> None:
        """One number of the gradients of the averaged leaves becomes ``value``."""
        places = [i for i, leaf in enumerate(self.leaves) if leaf.averaged and grads[i].size]
        if not places:
            return
        place = places[seed % len(places)]
        grad = np.array(grads[place])
        grad.reshape(-1)[seed % grad.size] = (
            complex(value, value) if grad.dtype.kind == "c" else value
        )
        grads[place] = grad

    @rule(seed=seeds, steps=st.integers(1, 4), bad=bad_steps)
    def train_eagerly(self, seed: int, steps: int, bad: int) -> None:
        self.train("eager", self.several(seed, steps, bad))

    @rule(seed=seeds, steps=st.integers(1, 4), bad=bad_steps)
    def go_on(self, seed: int, steps: int, bad: int) -> None:
        """In a context that is compiled already, or eagerly."""
        known = [context for context in COMPILED if context in self.compiled]
        context = known[seed % len(known)] if known else "eager"
        self.train(context, self.several(seed, 2 if context == "scan" else steps, bad))

    @rule(seed=seeds, context=st.sampled_from(COMPILED), member=st.integers(0, 1), bad=bad_steps)
    def train_in(self, seed: int, context: str, member: int, bad: int) -> None:
        self.train(context, self.several(seed, 2, bad), member)

    @rule(seed=seeds, pick=picks)
    def live_values_change(self, seed: int, pick: int) -> None:
        """Somebody else writes to the params, which may have been NaN."""
        values = self.values(seed)
        self.params = self.spec.build(values, python=bool(pick % 2))
        self.course.params = values


def is_real(leaf: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def flipped(gradient: Any) -> Any:
    return gradient if gradient is None else np.asarray(-gradient)
