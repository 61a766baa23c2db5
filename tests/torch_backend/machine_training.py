"""Rules: the model is trained, and averages follow, skip or start again."""

import copy

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from ema import StateError
from tests.torch_backend.machine_base import Base, choose, picks, seeds
from tests.torch_backend.machine_models import random
from tests.torch_backend.machine_reference import trainable

__all__ = ["Training"]

CALLS_OF_LIVE_WEIGHTS = ("update", "reset", "copying", "load_state_dict", "averaged_module")
"""What is refused while averages are swapped in."""


class Training(Base):
    """Values change in place."""

    @precondition(lambda self: self.live_is_free)
    @rule(
        seed=seeds,
        scale=st.sampled_from((1.0, 1e-3, 100.0)),
        how=st.sampled_from(("add", "set", "buffers")),
    )
    def train(self, seed: int, scale: float, how: str) -> None:
        """Write new values in place, all parameters or all buffers."""
        with torch.no_grad():
            tensors = self.model.buffers() if how == "buffers" else self.model.parameters()
            for number, tensor in enumerate(tensors):
                values = random(tensor.shape, tensor.dtype, seed + number, scale)
                tensor.copy_(tensor + values if how == "add" else values)
        self.live_changed()

    @precondition(lambda self: self.swap is None)
    @rule(seed=seeds, steps=st.integers(1, 5))
    def train_and_update(self, seed: int, steps: int) -> None:
        for step in range(steps):
            self.train(seed=seed + step, scale=0.1, how="add")
            self.update()

    @precondition(lambda self: self.swap is None)
    @rule()
    def update_alone(self) -> None:
        self.update()

    @precondition(lambda self: self.swap is not None)
    @rule(call=st.sampled_from(CALLS_OF_LIVE_WEIGHTS))
    def call_while_swapped(self, call: str) -> None:
        with self.refused(StateError, "swapped"):
            if call == "copying":
                copy.deepcopy(self.ema)
            elif call == "load_state_dict":
                self.ema.load_state_dict(self.ema.state_dict())
            elif call == "averaged_module":
                self.ema.averaged_module(self.reference.labels[0])
            else:
                getattr(self.ema, call)()

    @precondition(lambda self: self.swap is None)
    @rule()
    def reset(self) -> None:
        self.ema.reset()
        self.reference.reset()
        self.modules_follow()

    @precondition(lambda self: self.live_is_free)
    @rule(pick=picks, seed=seeds, value=st.sampled_from((torch.nan, torch.inf, -torch.inf)))
    def write_nonfinite(self, pick: int, seed: int, value: float) -> None:
        """One element of one tensor; rarely where that goes into an average for good."""
        tensors = [t for t in self.model.parameters() if trainable(t) and t.numel()]
        if not tensors or (self.options["on_nonfinite"] == "propagate" and seed % 8):
            return
        tensor = choose(tensors, pick)
        with torch.no_grad():
            tensor[tuple(seed % size for size in tensor.shape)] = value
        self.live_changed()

    @precondition(lambda self: self.swap is None and self.options["on_nonfinite"] != "propagate")
    @rule(pick=picks, seed=seeds, heal=st.booleans())
    def update_with_nonfinite(self, pick: int, seed: int, heal: bool) -> None:
        """Until an update was due; the next values may be finite again."""
        self.write_nonfinite(pick=pick, seed=seed, value=torch.nan)
        for _ in range(self.options["update_every"]):
            self.update()
        if heal:
            self.train(seed=seed, scale=1.0, how="set")
            self.update()
