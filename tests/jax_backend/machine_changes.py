"""Rules: calls that are refused, after which nothing has changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

import ema
from ema.jax_backend import get_params_ema, load_params_ema
from tests.jax_backend.machine_base import choose, picks, seeds
from tests.jax_backend.machine_training import Training

__all__ = ["Changes"]


class Changes(Training):
    """Params, names and files that are not those of the state."""

    @rule(seed=seeds, pick=picks, what=st.sampled_from(("no params", "params", "name", "file")))
    def something_is_refused(self, seed: int, pick: int, what: str) -> None:
        places = [i for group in self.course.groups for i in group.averaged]
        if what == "name":
            with pytest.raises(
                ema.ArgumentError,
                match=r"`name` must (be one of|not be given)",
            ):
                get_params_ema(self.state, self.params, "no such name")
        elif what == "file" and self.files and places:
            self.load_into(self.other_params(choose(places, pick)), seed)
        elif what == "params" and self.wrapper.outer == "none" and places:
            self.update_with(self.other_params(choose(places, pick)), seed)
        elif what == "no params" and self.wrapper.outer == "none" and self.wrapper.inner != "alone":
            with pytest.raises(ema.ArgumentError, match="`params` must be given to average them"):
                self.tx.update(self.spec.build(self.grads(seed)), self.state)

    def other_params(self, place: int) -> Any:
        """Params with another shape in one leaf."""
        values = list(self.course.params)
        values[place] = np.zeros((*values[place].shape, 2), values[place].dtype)
        return self.spec.build(values)

    def update_with(self, other: Any, seed: int) -> None:
        grads = self.spec.build(self.grads(seed))
        match = "do not match the average"
        with pytest.raises(ema.ModelError, match=match):
            self.tx.update(grads, self.state, other)
        with pytest.raises(ema.ModelError, match=match):
            get_params_ema(self.state, other, self.course.groups[0].labels[0])

    def load_into(self, other: Any, seed: int) -> None:
        paths, _ = choose(self.files, seed)
        label = self.course.groups[0].labels[0]
        with pytest.raises(ema.CheckpointError, match="belongs to other params"):
            load_params_ema(paths[label], self.quiet(self.tx.init)(other), label)
