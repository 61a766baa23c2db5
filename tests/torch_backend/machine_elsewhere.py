"""Rules: averages go elsewhere, and the live model is left alone."""

from pathlib import Path

import safetensors.torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from ema import StateError
from tests.torch_backend.machine_base import Base, choose, picks, seeds
from tests.torch_backend.machine_reference import Snapshot, assert_same
from tests.torch_backend.machine_shown import AveragedModule

__all__ = ["Elsewhere"]


class Elsewhere(Base):
    """``copy_to``, averaged modules, the teacher and exports."""

    @precondition(lambda self: self.swap is None)
    @rule(pick=picks, seed=seeds, dtype=st.sampled_from((None, "half", "double")))
    def copy_to_another(self, pick: int, seed: int, dtype: str | None) -> None:
        label = choose(self.reference.labels, pick)
        other = self.twin(seed)
        if dtype is not None:
            # a cast parts parameters that only share their memory
            if any(len(names) > 1 for names in self.reference.live.groups.values()):
                return
            getattr(other, dtype)()
        expected = Snapshot(other)
        self.ema.copy_to(other, name=label)
        averages = self.reference.averages(label)
        live = self.reference.live
        shown = {
            first: (averages.get(first, live.value(first))).to(expected.value(first).dtype)
            for first in expected.groups
        }
        expected.check(other, shown)

    @precondition(lambda self: self.swap is None)
    @rule(pick=picks)
    def copy_to_the_live_model(self, pick: int) -> None:
        label = choose(self.reference.labels, pick)
        shown = self.reference.shown(label)
        self.ema.copy_to(self.model, name=label)
        self.reference.live.check(self.model, shown)
        self.live_changed()

    @precondition(lambda self: self.swap is None)
    @rule(pick=picks)
    def make_an_averaged_module(self, pick: int) -> None:
        """A copy that shows an average from now on, until it is given up."""
        label = choose(self.reference.labels, pick)
        if len(self.modules) == 3:
            del self.modules[pick % 3]
        self.modules.append(AveragedModule(self.ema.averaged_module(label), label))
        self.modules[-1].follow(self.reference)

    @rule()
    def call_the_teacher(self) -> None:
        """A forward pass sees averages, and everything else as it is, and leaves no trace."""
        if self.reference.labels != [None]:
            with self.refused(StateError, "one average"):
                self.ema()
            return
        output = self.ema()
        shown, live = self.reference.shown(None), self.reference.live
        expected = {
            name: shown.get(first, live.value(first))
            for first, names in live.groups.items()
            for name in names
        }
        assert_same("the teacher", output, expected)

    @rule(pick=picks, to_file=st.booleans())
    def export(self, pick: int, to_file: bool) -> None:
        """A plain state dict in the dtypes of the model, of each name there is."""
        label = choose(self.reference.labels, pick)
        if to_file:
            path = Path(self.folder.name) / "exported.safetensors"
            exported = safetensors.torch.load_file(self.ema.export(path, name=label))
        else:
            exported = self.ema.averaged_state_dict(name=label)
        shown, live = self.reference.shown(label), self.reference.live
        expected = {
            name: shown.get(first, live.value(first))
            for first, names in live.groups.items()
            for name in names
        }
        assert_same("the export", exported, expected)
