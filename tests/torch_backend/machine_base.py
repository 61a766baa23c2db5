"""The beginning of every run, what holds after every step, and what the rules share."""

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant
from torch import Tensor, nn

import ema
from ema import EMAModel, ModelError, StateError
from tests.torch_backend.machine_models import Tree, random, specs
from tests.torch_backend.machine_options import options_of
from tests.torch_backend.machine_reference import Reference, Snapshot, assert_same
from tests.torch_backend.machine_shown import AveragedModule, Swapped

__all__ = ["Base", "choose", "picks", "seeds", "through_a_file"]

picks = st.integers(0, 63)
seeds = st.integers(0, 999)


def choose(things: Any, pick: int) -> Any:
    """One of them."""
    return list(things)[pick % len(things)]


class Base(RuleBasedStateMachine):
    """A model, its ``EMAModel``, and what is known of the two.

    Attributes:
        family: options that are drawn.
        examples: runs so far.
        steps: steps of these.
    """

    family: ClassVar[str] = "plain"
    examples: ClassVar[int] = 0
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).examples += 1
        self.folder = tempfile.TemporaryDirectory()
        self.states: list[tuple[str, Any, Reference]] = []
        self.blocks: list[Any] = []
        self.swap: Swapped | None = None
        self.applied = False
        self.must_read = True
        self.modules: list[AveragedModule] = []

    @initialize(data=st.data(), spec=specs, watched=st.booleans())
    def begin(self, data: Any, spec: Any, watched: bool) -> None:
        self.model: Tree = spec.build()
        self.options = data.draw(options_of(self.family, self.model))
        self.watched = watched
        if not Reference(self.model, self.options).averaged:
            with pytest.raises(ModelError, match="nothing to average"):
                self.average(self.model)
            self.options |= {"include": None, "exclude": None}
            self.model.p9 = nn.Parameter(random((5,), torch.float32, 0))
        elif not self.places():
            self.model.p9 = nn.Parameter(random((5,), torch.float32, 0), requires_grad=False)
        self.reference = Reference(self.model, self.options)
        self.ema = self.average(self.model)

    def average(self, model: nn.Module) -> EMAModel:
        """A new ``EMAModel`` with the options of this run."""
        told: Any = contextlib.nullcontext()
        if not self.options["stochastic_rounding"]:
            (schedule,) = Reference(model, self.options).schedules.values()
            if 0.0 < schedule.weight(1e6, 1) < 2.0**-8:
                told = pytest.warns(ema.EMAWarning, match="does not move")
        with told:
            return EMAModel(model, **self.options)

    @invariant()
    def everything_is_as_the_reference_says(self) -> None:
        type(self).steps += 1
        reference = self.reference
        counters = (self.ema.step, self.ema.count, self.ema.skipped)
        assert counters == (reference.step, reference.count, reference.skipped)
        assert set(self.ema.left_alone) == reference.left_alone
        self.check_models()
        for module in self.modules:
            module.check()
        if self.watched or self.must_read:
            self.read_averages()

    def check_models(self) -> None:
        """The live model and the one that averages are swapped into hold what they should."""
        swap = self.swap
        if swap is None or swap.target is not self.model:
            self.reference.live.check(self.model)
        if swap is not None:
            swap.check()

    def read_averages(self) -> None:
        """The averages have the bits of the reference, and are near those of float64."""
        if self.swap is None:
            self.must_read = False
        for label in self.reference.labels:
            averages = self.ema.averaged_parameters(label)
            assert_same("the average", averages, self.reference.averages(label))
            self.reference.check_exact(label, averages)

    def teardown(self) -> None:
        try:
            if hasattr(self, "ema") and sys.exc_info()[0] is None:
                self.end()
        finally:
            while getattr(self, "blocks", None):  # in an example that broke off
                with contextlib.suppress(StateError):
                    self.blocks.pop().__exit__(None, None, None)
            self.folder.cleanup()

    def end(self) -> None:
        """Leave what was entered and look at everything once more."""
        while self.blocks:
            self.blocks.pop().__exit__(None, None, None)
        if self.applied:
            self.ema.restore_original()
        self.end_swap()
        self.check_models()
        self.read_averages()

    @property
    def live_is_free(self) -> bool:
        """Whether live weights are in the live model."""
        return self.swap is None or self.swap.target is not self.model

    def places(self) -> list[tuple[nn.Module, str]]:
        """Every parameter of the live model once, where it is first found."""
        places: dict[int, tuple[nn.Module, str]] = {}
        for module in self.model.modules():
            for key, parameter in module._parameters.items():
                places.setdefault(id(parameter), (module, key))
        return list(places.values())

    def live_changed(self) -> None:
        """The model is what the machine has just made of it."""
        self.reference.live = Snapshot(self.model)
        if self.swap is None:
            self.reference.look()

    @contextlib.contextmanager
    def refused(self, error: type[Exception], match: str | None = None) -> Iterator[None]:
        """The call raises, and then nothing has changed."""
        with pytest.raises(error, match=match):
            yield
        self.must_read = True

    def update(self) -> None:
        """One update, of both."""
        skipped = self.reference.skipped
        if self.reference.update():
            with self.refused(StateError, "finite"):
                self.ema.update()
            return
        told: Any = contextlib.nullcontext()
        is_skipped = self.reference.skipped > skipped
        if is_skipped and (self.reference.count, skipped) == (0, 0):
            told = pytest.warns(ema.EMAWarning, match="refused every update so far")
        with told:
            self.ema.update()
        self.modules_follow()

    def modules_follow(self) -> None:
        """The averaged modules have just been brought up to date."""
        for module in self.modules:
            module.follow(self.reference)

    def end_swap(self) -> None:
        """Live weights are back."""
        if self.swap is not None and self.swap.target is not self.model:
            self.swap.before.check(self.swap.target)
        self.swap, self.applied = None, False
        self.reference.look()

    def look(self) -> None:
        """The library sees the model as it is: it widens averages, and knows the objects."""
        if self.swap is None:
            self.read_averages()

    def tied_by_memory(self, tensor: Tensor) -> bool:
        """Whether other objects lie in the memory of this one."""
        live = self.reference.live
        return any(
            live.tensors[name].tensor is not tensor
            for names in live.groups.values()
            if any(live.tensors[name].tensor is tensor for name in names)
            for name in names
        )

    def twin(self, seed: int) -> nn.Module:
        """Another model of the same kind, with its own values."""
        other = through_a_file(self.model)
        if self.swap is None:
            with torch.no_grad():
                for number, tensor in enumerate(other.parameters()):
                    tensor.copy_(random(tensor.shape, tensor.dtype, seed + number))
        return other


def through_a_file(thing: Any) -> Any:
    """What comes back from ``torch.save``: ties and memory orders are kept."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=isinstance(thing, dict))
