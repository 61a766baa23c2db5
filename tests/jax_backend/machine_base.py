"""The beginning of every run, what holds after every rule, and what the rules share."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from typing import Any, ClassVar

import jax
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

import ema
from ema.jax_backend import ParamsEMAState, get_params_ema
from tests.jax_backend.machine_options import options_of
from tests.jax_backend.machine_reference import assert_bits, stored
from tests.jax_backend.machine_trees import FLOATS, specs
from tests.jax_backend.machine_wrappers import Course, wrappers

__all__ = ["Base", "choose", "picks", "seeds"]

picks = st.integers(0, 63)
seeds = st.integers(0, 999)


def choose(things: Any, pick: int) -> Any:
    """One of them."""
    return list(things)[pick % len(things)]


class Base(RuleBasedStateMachine):
    """Params, an optimizer's state with averages, and what is known of the two.

    Attributes:
        family: options that are drawn.
        examples: runs so far.
        steps: steps of training of these.
        used: how often each wrapper and each context was.
    """

    family: ClassVar[str] = "plain"
    examples: ClassVar[int] = 0
    steps: ClassVar[int] = 0
    used: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        super().__init__()
        type(self).examples += 1
        self.folder = tempfile.TemporaryDirectory()
        self.settings = contextlib.ExitStack()
        self.settings.enter_context(jax.numpy_dtype_promotion("standard"))  # what optax needs
        self.settings.enter_context(jax.enable_x64(self.family == "double"))
        self.files: list[tuple[dict[Any, Any], Course]] = []
        self.snapshots: list[Any] = []

    @initialize(data=st.data(), seed=seeds)
    def begin(self, data: Any, seed: int) -> None:
        floats = ("float64", "float64", *FLOATS) if self.family == "double" else FLOATS
        self.spec = data.draw(specs(floats))
        self.leaves = self.spec.leaves()
        self.wrapper = data.draw(wrappers(self.leaves))
        options = data.draw(options_of(self.family))
        if options.get("on_nonfinite") == "raise" and self.wrapper.traces:
            options["on_nonfinite"] = "skip"
        values = self.values(seed)
        self.params = self.spec.build(values, python=True)
        self.take(options)
        self.state = self.quiet(self.tx.init)(self.params)
        self.course = Course(self.spec, self.wrapper, self.known(), values)
        self.count(f"{self.wrapper.outer} {self.wrapper.inner}")

    def take(self, options: dict[str, Any]) -> None:
        """From now on the transform has these options."""
        self.options = options
        with warnings.catch_warnings():
            # as it is said: rounded to nearest a bfloat16 average need not move
            warnings.filterwarnings("ignore", "a bfloat16 average does not move", ema.EMAWarning)
            self.tx = self.wrapper.transform(self.spec, options)
            self.tx.init(self.params)  # inject_hyperparams makes the transform only now
        self.step = self.quiet(self.wrapper.step(self.tx))
        self.compiled: dict[str, Any] = {}

    @staticmethod
    def quiet(step: Any) -> Any:
        """A call that ignores the warning that ``inject_hyperparams`` repeats at each of them."""

        def run(*arguments: Any) -> Any:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "a bfloat16 average does", ema.EMAWarning)
                return step(*arguments)

        return run

    def known(self) -> dict[str, Any]:
        """The options as the transform sees them: ``inject_hyperparams`` rounds a decay."""
        options = dict(self.options)
        if self.wrapper.inner == "inject" and isinstance(options["decay"], float):
            options["decay"] = float(np.float32(options["decay"]))
        return options

    def values(self, seed: int) -> list[Any]:
        """Params of their own."""
        return self.drawn("value", seed)

    def grads(self, seed: int) -> list[Any]:
        """Gradients, zeros of float32 where a leaf is not averaged."""
        drawn = self.drawn("gradient", seed)
        return [
            g if g is None or leaf.averaged else g.astype(np.float32)
            for leaf, g in zip(self.leaves, drawn, strict=True)
        ]

    def drawn(self, what: str, seed: int) -> list[Any]:
        """Arrays for all leaves; None stays None."""
        return [
            getattr(leaf, what)(1000 * seed + number) if leaf.array else None
            for number, leaf in enumerate(self.leaves)
        ]

    def count(self, what: str) -> None:
        """Count a word for the last line of a family."""
        self.used[what] = self.used.get(what, 0) + 1

    @invariant()
    def everything_is_as_the_reference_says(self) -> None:
        self.check(self.params, self.state, self.course)
        self.read()

    def check(self, params: Any, state: Any, course: Course) -> None:
        """Params and state are what the reference has; it goes on from these."""
        found = self.spec.flatten(params)
        for name, ours, theirs in zip(course.names, found, course.params, strict=True):
            if theirs is None:
                assert ours is None, f"`{name}` is {ours!r}, expected None"
            else:
                value = stored(ours) if hasattr(ours, "dtype") else np.asarray(ours, theirs.dtype)
                assert_bits(f"the parameter `{name}`", value, theirs)
        nodes = averages_in(state)
        assert len(nodes) == len(course.groups)
        for node, group in zip(nodes, course.groups, strict=True):
            group.check(node, self.spec.flatten)

    def read(self) -> None:
        """Averages with the params and without."""
        groups, leaves = self.course.groups, self.leaves
        live = self.spec.flatten(self.params)
        for label in groups[0].labels:
            averages = {i: t for group in groups for i, t in group.tracks[label].items()}
            tree = get_params_ema(self.state, self.params, label)
            assert jax.tree.structure(tree) == jax.tree.structure(self.params)
            for i, value in enumerate(self.spec.flatten(tree)):
                name = self.course.names[i]
                if i in averages:
                    expected = averages[i].array().astype(leaves[i].dtype)
                    assert_bits(f"the average of `{name}`, read,", stored(value), expected)
                else:
                    assert value is live[i], f"`{name}` is {value!r}, expected {live[i]!r}"
            self.read_without_params(label, averages)

    def read_without_params(self, label: str | None, averages: dict[int, Any]) -> None:
        """As they are stored, if nothing is left to fill."""
        unknown = [i for i, leaf in enumerate(self.leaves) if leaf.array and i not in averages]
        holes = [not g.here >= set(range(len(self.leaves))) for g in self.course.groups]
        if unknown or len(self.course.groups) > 1:
            with pytest.raises(ema.ArgumentError, match="`params` must be given"):
                get_params_ema(self.state, name=label)
        elif not any(holes):
            for i, value in enumerate(self.spec.flatten(get_params_ema(self.state, name=label))):
                if i in averages:
                    assert_bits("the average, read,", stored(value), averages[i].array())

    def teardown(self) -> None:
        self.settings.close()
        self.folder.cleanup()


def averages_in(state: optax.OptState) -> list[ParamsEMAState]:
    """The states of ``params_ema``."""
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, ParamsEMAState))
    return [leaf for leaf in leaves if isinstance(leaf, ParamsEMAState)]
