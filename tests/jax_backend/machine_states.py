"""Rules: a run is saved and resumed, and its chain is changed."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import serialization
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import ema
from ema.jax_backend import adapt_opt_state, load_params_ema, save_params_ema
from tests.jax_backend.machine_base import choose, picks, seeds
from tests.jax_backend.machine_training import Training
from tests.jax_backend.machine_wrappers import Course

__all__ = ["States"]


class States(Training):
    """Files, pickles, ``flax.serialization`` and ``adapt_opt_state``."""

    @rule()
    def save(self) -> None:
        """One file for each average."""
        groups = self.course.groups
        counters = {(group.step, group.count, group.skipped) for group in groups}
        paths = {}
        for label in groups[0].labels:
            path = Path(self.folder.name) / f"{len(self.files)}-{label}.safetensors"
            if len(counters) > 1:
                with pytest.raises(ema.ArgumentError, match="groups of one average at different"):
                    save_params_ema(path, self.state, label)
                return
            paths[label] = save_params_ema(path, self.state, label)
        self.files.append((paths, self.course.copy()))

    @precondition(lambda self: bool(self.files))
    @rule(pick=picks, fresh=st.booleans())
    def load(self, pick: int, fresh: bool) -> None:
        """The averages of a file, in this state or in that of a run that has just begun."""
        paths, course = choose(self.files, pick)
        if fresh:
            self.state = self.quiet(self.tx.init)(self.params)
            self.course = Course(self.spec, self.wrapper, self.known(), self.course.params)
        for label in self.course.groups[0].labels:
            with self.told_of_a_lost_remainder(course):
                self.state = load_params_ema(paths[label], self.state, label)
        for group, saved in zip(self.course.groups, course.groups, strict=True):
            group.step, group.count = saved.step, saved.count
            group.skipped = saved.skipped if group.guard == "skip" else 0
            for label, tracks in group.tracks.items():
                for i, track in tracks.items():
                    track.load(saved.tracks[label][i])

    @contextlib.contextmanager
    def told_of_a_lost_remainder(self, course: Course) -> Iterator[None]:
        saved = course.options.get("compensated") and any(g.averaged for g in course.groups)
        with contextlib.ExitStack() as stack:
            if saved and not self.options.get("compensated"):
                stack.enter_context(pytest.warns(ema.EMAWarning, match="has the remainder of"))
            yield

    @rule(how=st.sampled_from(("pickle", "flax")))
    def keep(self, how: str) -> None:
        """Params and state of this moment."""
        if self.wrapper.inner == "named":  # flax does not know the state of a named_chain
            how = "pickle"
        both = (self.params, self.state)
        kept = pickle.dumps(both) if how == "pickle" else serialization.to_bytes(both)
        self.snapshots.append((how, kept, self.tx, self.course.copy()))

    @precondition(lambda self: any(tx is self.tx for _, _, tx, _ in self.snapshots))
    @rule(pick=picks, seed=seeds)
    def resume(self, pick: int, seed: int) -> None:
        """Go back to such a moment."""
        mine = [each for each in self.snapshots if each[2] is self.tx]
        how, kept, _, course = choose(mine, pick)
        if how == "pickle":
            both = pickle.loads(kept)
        else:
            params = self.spec.build(self.values(seed))
            both = serialization.from_bytes((params, self.quiet(self.tx.init)(params)), kept)
        self.params, self.state = jax.tree.map(jnp.asarray, both)
        self.course = course.copy()

    @precondition(lambda self: self.wrapper.inner not in {"inject", "alone"})
    @rule()
    def remove_and_insert(self) -> None:
        """The average goes and comes again, and starts at the params."""
        without = self.wrapper.transform(self.spec, self.options, averaged=False)
        left = adapt_opt_state(self.state, without, self.params)
        assert jax.tree.structure(left) == jax.tree.structure(without.init(self.params))
        self.state = adapt_opt_state(left, self.tx, self.params)
        self.course.begin()

    @precondition(lambda self: self.wrapper.inner != "inject")
    @rule(data=st.data(), seed=seeds)
    def change_options(self, data: Any, seed: int) -> None:
        """Another schedule, other steps, with a remainder or a guard or without, go on."""
        options = dict(self.options)
        if isinstance(options["decay"], float):
            options["decay"] = data.draw(st.sampled_from((0.5, 0.9, 0.99)))
        options["update_every"] = data.draw(st.sampled_from((1, 2, 3)))
        if self.family != "narrow":
            options["compensated"] = data.draw(st.booleans())
        if options.get("on_nonfinite") != "raise":
            options["on_nonfinite"] = data.draw(st.sampled_from(("skip", "propagate")))
        self.take(options)
        self.state = adapt_opt_state(self.state, self.tx, self.params)
        before = self.course.groups
        self.course.options = self.known()
        self.course.begin()
        for group, old in zip(self.course.groups, before, strict=True):
            group.step, group.count = old.step, old.count
            both = group.guard == old.guard == "skip"
            group.skipped = old.skipped if both else 0
            for label, tracks in group.tracks.items():
                for i, track in tracks.items():
                    track.load(old.tracks[label][i])

    @rule()
    def adapt_to_the_same(self) -> None:
        """Nothing to do: the same arrays."""
        state = adapt_opt_state(self.state, self.tx, self.params)
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(self.state), strict=True)
        assert all(new is old for new, old in pairs)
        self.state = state
