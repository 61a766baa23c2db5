"""Rules: states are saved, loaded and damaged, and averages copied."""

import contextlib
import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import ema
from ema import CheckpointError
from tests.torch_backend.machine_base import choose, picks, seeds, through_a_file
from tests.torch_backend.machine_reference import Reference, assert_same
from tests.torch_backend.machine_training import Training

__all__ = ["States"]


class States(Training):
    """Files, ``state_dict()``, copies and pickles."""

    @rule(to_file=st.booleans())
    def save(self, to_file: bool) -> None:
        """Keep a state, as files or as ``state_dict()``; also while averages are swapped in."""
        if not to_file:
            state = through_a_file(self.ema.state_dict())
            self.check_state(state)
            self.states.append(("dict", state, self.reference.saved()))
            return
        paths = {}
        for label in self.reference.labels:
            path = Path(self.folder.name) / f"{len(self.states)}-{label}.safetensors"
            paths[label] = self.ema.save(path, name=label)
        self.states.append(("files", paths, self.reference.saved()))

    def loadable(self) -> list[tuple[str, Any, Reference]]:
        """States of the model as it is now: with the same parameters and ties."""
        groups = self.reference.live.groups
        return [state for state in self.states if state[2].live.groups == groups]

    @precondition(lambda self: self.swap is None and bool(self.loadable()))
    @rule(pick=picks, fresh=st.sampled_from(("no", "same model", "other model")))
    def load(self, pick: int, fresh: str) -> None:
        """Go on from a state: this object, a new one, or a new one with a model of its own."""
        how, stored, state = choose(self.loadable(), pick)
        new = Reference(self.model, self.options)
        if fresh != "no" and not new.wanted():
            return  # there is no EMAModel without anything to average
        if fresh != "no" and new.left_alone != state.left_alone:
            return  # a new look at the buffers has chosen others, and the state does not fit
        if fresh == "other model":
            self.model = through_a_file(self.model)
            self.reference.model = self.model
            self.live_changed()
        if fresh != "no":
            self.ema = self.average(self.model)
            self.reference.begin()
            self.modules.clear()
        with self.told_of_other_live_weights(state):
            if how == "dict":
                self.ema.load_state_dict(stored)
            else:
                for label, path in stored.items():
                    self.ema.load(path, name=label)
        self.reference.load(state)
        self.modules_follow()
        self.must_read = True

    @contextlib.contextmanager
    def told_of_other_live_weights(self, state: Reference) -> Iterator[None]:
        """Before the start a state that differs from the live weights is loaded with a warning."""
        early = state.step < self.options["update_after_step"]
        with warnings.catch_warnings():
            if early:
                warnings.filterwarnings("ignore", "the state is of step", ema.EMAWarning)
            yield

    @precondition(
        lambda self: (
            self.family == "several"
            and self.swap is None
            and self.reference.started
            and bool(self.loadable())
        )
    )
    @rule(pick=picks, other=picks)
    def load_one_of_several(self, pick: int, other: int) -> None:
        """The others stay as they are; all must be of the same tensors."""
        how, stored, state = choose(self.loadable(), pick)
        label = choose(self.reference.labels, other)
        if how != "files":
            return
        if set(state.averaged) != set(self.reference.averaged):
            with self.refused(CheckpointError):
                self.ema.load(stored[label], name=label)
            return
        with self.told_of_other_live_weights(state):
            self.ema.load(stored[label], name=label)
        self.reference.load(state, [label])
        self.modules_follow()

    @precondition(lambda self: self.swap is None)
    @rule(damage=st.sampled_from(("tensor", "shape", "count", "version", "key")), pick=picks)
    def load_a_damaged_state(self, damage: str, pick: int) -> None:
        state = self.ema.state_dict()
        label = choose(self.reference.labels, pick)
        averages = state["averages"] if label is None else state["averages"][label]
        if damage == "tensor":
            averages["no.such.name"] = torch.zeros(3)
        elif damage == "shape" and averages:
            name = choose(averages, pick)
            averages[name] = averages[name].new_zeros((*averages[name].shape, 2))
        elif damage == "count":
            state["count"] = state["step"] + 1
        elif damage in {"version", "shape"}:
            state["format_version"] = 99
        else:
            del state["update_every"]
        with self.refused(CheckpointError):
            self.ema.load_state_dict(state)

    @precondition(lambda self: self.swap is None)
    @rule(how=st.sampled_from(("deepcopy", "pickle", "torch.save")), seed=seeds)
    def copy(self, how: str, seed: int) -> None:
        """Go on with a copy of model and average; the original does not see it."""
        both = (self.model, self.ema)
        live = self.reference.live
        if how == "deepcopy":
            model, average = copy.deepcopy(both)
        elif how == "pickle":
            model, average = pickle.loads(pickle.dumps(both))
        else:
            model, average = through_a_file(both)
        assert average.model is model
        old = {label: self.ema.averaged_parameters(label) for label in self.reference.labels}
        kept = {label: {n: t.clone() for n, t in each.items()} for label, each in old.items()}
        original = self.model
        named = dict(model.named_parameters(remove_duplicate=False))
        named |= dict(model.named_buffers(remove_duplicate=False))
        assert_same("the copy", named, {name: live.value(name) for name in live.tensors})
        self.model, self.ema = model, average
        self.reference.model = model
        self.live_changed()
        modules, self.modules = self.modules, []  # copies have none
        self.train_and_update(seed=seed, steps=1)
        live.check(original)
        for module in modules:
            module.check()
        for label, averages in old.items():
            assert_same("the original", averages, kept[label])

    def check_state(self, state: dict[str, Any]) -> None:
        """A ``state_dict()`` holds what the design says."""
        reference = self.reference
        assert (state["step"], state["count"]) == (reference.step, reference.count)
        if self.swap is None:
            assert set(state["not_averaged"]) == reference.not_averaged()
        assert state.get("skipped", 0) == reference.skipped
        for label in reference.labels:
            held = state["averages"] if label is None else state["averages"][label]
            assert_same("the state", held, reference.averages(label))
            if expected := reference.remainders(label):
                assert_same("the state", state["remainders"], expected)

    @rule()
    def read(self) -> None:
        self.check_state(self.ema.state_dict())
        self.must_read = True
