"""Rules: calls that are refused, after which nothing has changed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis.stateful import precondition, rule

import ema
from ema.jax_backend import get_params_ema, load_params_ema
from tests.jax_backend.machine_base import choose, picks, seeds
from tests.jax_backend.machine_training import Training

__all__ = ["Changes"]


class Changes(Training):
    """Params, names and files that are not those of the state."""

    @rule(seed=seeds)
    def update_without_params(self, seed: int) -> None:
        tree = self.spec.build(self.grads(seed))
        if self.wrapper.inner == "alone" or self.wrapper.outer != "none":
            return  # wrappers trace, and say it in their own way
        with pytest.raises(ema.ArgumentError, match="`params` must be given to average them"):
            self.tx.update(tree, self.state)

    @rule(seed=seeds, pick=picks)
    def update_with_other_params(self, seed: int, pick: int) -> None:
        """A leaf of another shape."""
        mine = [i for group in self.course.groups for i in group.averaged]
        if not mine or self.wrapper.outer != "none":
            return
        values, place = list(self.course.params), choose(mine, pick)
        values[place] = np.zeros((*values[place].shape, 2), values[place].dtype)
        other = self.spec.build(values)
        grads = self.spec.build(self.grads(seed))
        match = "not those of the average"
        with pytest.raises(ema.ModelError, match=match):
            self.tx.update(grads, self.state, other)
        with pytest.raises(ema.ModelError, match=match):
            get_params_ema(self.state, other, self.course.groups[0].labels[0])

    @rule()
    def read_by_a_name_that_nothing_has(self) -> None:
        with pytest.raises(ema.ArgumentError, match="`name` must be one of"):
            get_params_ema(self.state, self.params, "no such name")

    @precondition(lambda self: bool(self.files))
    @rule(pick=picks, seed=seeds)
    def load_into_other_params(self, pick: int, seed: int) -> None:
        """One leaf has another shape."""
        paths, course = choose(self.files, pick)
        mine = [i for group in course.groups for i in group.averaged]
        if not mine:
            return
        values, place = list(self.course.params), choose(mine, seed)
        values[place] = np.zeros((*values[place].shape, 2), values[place].dtype)
        state = self.tx.init(self.spec.build(values))
        label = self.course.groups[0].labels[0]
        with pytest.raises(ema.CheckpointError, match="belongs to other params"):
            load_params_ema(paths[label], state, label)
