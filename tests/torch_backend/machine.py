"""A state machine: random sequences of everything that can be done to an ``EMAModel`` and its model.

After every step the live model and the counters are what ``machine_reference`` says, and so are the
averages, which are read after every step in half of the runs and now and then in the others.

The families differ in the options that they draw: each has its own way through an update.
"""

import contextlib
import copy
import io
import pickle
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor, nn

import ema
from ema import CheckpointError, EMAModel, ModelError, StateError
from tests.torch_backend.machine_models import LAYOUTS, Tree, lay_out, random, specs
from tests.torch_backend.machine_reference import Reference, Snapshot, assert_same, trainable

__all__ = ["FAMILIES", "Machine", "machine_of"]

# What is known to fail and being mended: with True the machine keeps away from it.
KNOWN_FAULT_SAME_ADDRESS = False
"""Another stride or dtype at the same address is not noticed."""
KNOWN_FAULT_SAME_BYTES = False
"""Another shape of the same bytes is noticed half-way through an update, or not at all."""
KNOWN_FAULT_SHARED_MODULES = False
"""A shared module is known by its first name only."""
KNOWN_FAULT_EXCHANGED_PARAMETERS = False
"""Parameters that change names are mixed into each other's averages."""
KNOWN_FAULT_INFINITE_BUFFERS = False
"""Buffers that hold infinities when they are first seen are averaged."""
KNOWN_FAULT_EXITS_OUT_OF_ORDER = False
"""The exit of an outer block inside an inner one is not refused."""
KNOWN_FAULT_LOADED_BEFORE_START = False
"""What is loaded before ``update_after_step`` stays as it is until the next update."""
KNOWN_FAULT_TEACHER_ATTRIBUTES = False
"""Attributes that the forward pass of a teacher assigns stay on the live modules."""
KNOWN_FAULT_SEVERAL_FROM_FILES = True
"""Several averages cannot be loaded one file after the other where the files hold other tensors."""
KNOWN_FAULT_PARTED_TIES = True
"""Nothing notices new memory for a vector, or for a frozen tensor, that was tied by its memory."""
KNOWN_FAULT_NARROW_COPIES = True
"""Averages that were widened by a cast are narrow again in a copy or pickle."""
KNOWN_FAULT_LATE_INCLUDE = True
"""A frozen parameter that ``include`` asks for never joins where a state or copy did not have it."""
KNOWN_FAULT_NEWCOMERS = True
"""A newcomer joins in an update that is then skipped or refused, and so with its NaN, for good."""

CALLS_OF_LIVE_WEIGHTS = ("update", "reset", "copying", "load_state_dict", "averaged_module")
"""What is refused while averages are swapped in."""

FAMILIES = ("plain", "several", "narrow", "compensated", "guarded")

picks = st.integers(0, 63)
seeds = st.integers(0, 999)
decays = st.one_of(
    st.sampled_from((0.9, 0.5, 0.999, 0.0, 1.0)),
    st.floats(0, 1),
    st.builds(ema.HalfLife, steps=st.floats(0.1, 1e4)),
    st.builds(ema.HalfLifeRampup, steps=st.floats(0.1, 1e4), rampup_ratio=st.floats(0.01, 1)),
    st.builds(ema.InverseGammaWarmup, decay=st.floats(0, 1)),
    st.builds(ema.RampWarmup, decay=st.floats(0, 1)),
    st.builds(ema.DebiasedDecay, decay=st.floats(0, 0.999)),
    st.builds(ema.PowerFunction, gamma=st.floats(0, 20)),
    st.builds(ema.CosineDecay, start=st.floats(0, 1), total_steps=st.floats(1, 40)),
    st.just(ema.UniformAverage()),
)


def choose(things: Any, pick: int) -> Any:
    """One of them."""
    return list(things)[pick % len(things)]


@st.composite
def options_of(draw: Any, family: str, model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of an ``EMAModel`` of ``model``."""
    parameters = _patterns(name for name, _ in model.named_parameters(remove_duplicate=False))
    buffers = _patterns(name for name, _ in model.named_buffers(remove_duplicate=False))
    chosen = st.sampled_from(parameters) if parameters else st.nothing()
    some = st.one_of(st.none(), st.none(), st.lists(chosen, min_size=1, max_size=3))
    rules = [st.just("copy"), st.just("average")]
    if buffers:
        kinds = st.sampled_from(("copy", "average"))
        rules.append(st.dictionaries(st.sampled_from(buffers), kinds, min_size=1))
    narrow = family == "narrow"
    wide = st.sampled_from((None, None, torch.float32, torch.float64))
    decay = decays
    if family == "several":
        decay = st.dictionaries(st.sampled_from(("a", "b", "c")), decays, min_size=1)
        wide = st.sampled_from((None, torch.float32, torch.float64, torch.bfloat16))
    guards = ("skip", "raise", "propagate") if family == "guarded" else ("propagate",)
    return {
        "decay": draw(decay),
        "update_after_step": draw(st.sampled_from((0, 0, 0, 1, 3))),
        "update_every": draw(st.sampled_from((1, 1, 1, 2, 3))),
        "dtype": torch.bfloat16 if narrow else draw(wide),
        "include": draw(some) if parameters else None,
        "exclude": draw(some) if parameters else None,
        "buffers": draw(st.one_of(*rules)),
        "compensated": family == "compensated",
        "stochastic_rounding": draw(st.booleans()) if narrow else True,
        "seed": draw(st.integers(0, 2**64 - 1)) if narrow else 0,
        "on_nonfinite": draw(st.sampled_from(guards)),
    }


def _patterns(names: Iterator[str]) -> list[str]:
    """Patterns that match some of these names."""
    known = [name for name in names if not (KNOWN_FAULT_SHARED_MODULES and "shared" in name)]
    folders = {f"{name.split('.')[0]}.*" for name in known if "." in name}
    return [*known, *sorted(folders), *(["*"] if known else [])]


class Machine(RuleBasedStateMachine):
    """See the module; a family is a subclass."""

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

    # --- the beginning and what holds always ---------------------------------------------------

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

    # --- what is asked again and again ----------------------------------------------------------

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
        guarded = self.options["on_nonfinite"] != "propagate" and self.reference.started
        newcomers = set(self.reference.wanted()) - set(self.reference.averaged)
        if KNOWN_FAULT_NEWCOMERS and guarded and newcomers:
            self.train(seed=0, scale=1.0, how="set")
        skipped = self.reference.skipped
        if self.reference.update():
            with self.refused(StateError, "finite"):
                self.ema.update()
            return
        self.ema.update()
        if self.reference.skipped == skipped:
            self.modules_follow()

    def modules_follow(self) -> None:
        """The averaged modules have just been brought up to date."""
        for module in self.modules:
            module.follow(self.reference)

    # --- training -------------------------------------------------------------------------------

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

    # --- the model changes underneath -----------------------------------------------------------

    @precondition(lambda self: self.swap is None)
    @rule(pick=picks, seed=seeds, layout=st.sampled_from(LAYOUTS), frozen=st.booleans())
    def replace_parameter(self, pick: int, seed: int, layout: str, frozen: bool) -> None:
        """A new ``Parameter`` object of the same shape, under all names of the old one."""
        module, key = choose(self.places(), pick)
        old = getattr(module, key)
        value = lay_out(random(old.shape, old.dtype, seed), layout)
        grad = trainable(value) and not frozen
        new = nn.Parameter(value, requires_grad=grad)
        for holder in self.model.modules():
            for name, parameter in list(holder._parameters.items()):
                if parameter is old:
                    setattr(holder, name, new)
        self.live_changed()

    @precondition(lambda self: self.live_is_free)
    @rule(pick=picks, seed=seeds, layout=st.sampled_from(LAYOUTS))
    def replace_data(self, pick: int, seed: int, layout: str) -> None:
        """Other memory, perhaps in another order, for the same ``Parameter`` object."""
        module, key = choose(self.places(), pick)
        tensor = getattr(module, key)
        if KNOWN_FAULT_PARTED_TIES and self.tied_by_memory(tensor):
            return
        tensor.data = lay_out(random(tensor.shape, tensor.dtype, seed), layout)
        self.live_changed()

    def tied_by_memory(self, tensor: Tensor) -> bool:
        """Whether other objects lie in the memory of this one."""
        live = self.reference.live
        return any(
            live.tensors[name].tensor is not tensor
            for names in live.groups.values()
            if any(live.tensors[name].tensor is tensor for name in names)
            for name in names
        )

    @precondition(lambda self: not KNOWN_FAULT_SAME_ADDRESS and self.live_is_free)
    @rule(pick=picks, seed=seeds)
    def lay_out_at_the_same_address(self, pick: int, seed: int) -> None:
        """Other strides, or another dtype of as many bytes, where the tensor begins already."""
        module, key = choose(self.places(), pick)
        tensor = getattr(module, key)
        here = tensor.detach()
        room = here.untyped_storage().nbytes() // here.element_size() - here.storage_offset()
        halves = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}
        if seed % 2 and here.dtype in halves:
            self.look()
            tensor.data = here.view(halves[here.dtype])
        elif here.dim() > 1:
            tensor.data = here.permute(tuple(reversed(range(here.dim()))))
            if tensor.shape != here.shape:
                tensor.data = here
        elif here.dim() == 1 and room >= 2 * here.numel():
            tensor.data = here.as_strided(here.shape, (2 if here.stride(0) == 1 else 1,))
        with torch.no_grad():
            tensor.copy_(random(tensor.shape, tensor.dtype, seed))
        self.live_changed()

    def look(self) -> None:
        """Before a dtype changes the library sees the one that there is, and widens averages."""
        if self.swap is None:
            self.read_averages()

    @rule(dtype=st.sampled_from((torch.half, torch.bfloat16, torch.float, torch.double)))
    def cast(self, dtype: torch.dtype) -> None:
        """The whole model, also while averages are in it."""
        tensors = [seen.tensor for seen in self.reference.live.tensors.values()]
        if KNOWN_FAULT_PARTED_TIES and any(map(self.tied_by_memory, tensors)):
            return
        self.look()
        self.model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
        if self.swap is not None:
            self.swap.cast_since = True
        if self.live_is_free:
            self.live_changed()
        else:
            assert self.swap is not None
            self.reference.live = self.swap.follow_cast()

    @precondition(lambda self: self.live_is_free)
    @rule(pick=picks, requires_grad=st.booleans())
    def freeze(self, pick: int, requires_grad: bool) -> None:
        module, key = choose(self.places(), pick)
        parameter = getattr(module, key)
        if trainable(parameter):
            parameter.requires_grad_(requires_grad)
        self.live_changed()

    @precondition(lambda self: self.swap is None)
    @rule(pick=picks, seed=seeds)
    def add_parameter(self, pick: int, seed: int) -> None:
        """One that was not there before joins."""
        module = choose(list(self.model.modules()), pick)
        if not hasattr(module, "p8"):
            self.modules.clear()  # they would lack it, and say so
            module.p8 = nn.Parameter(random((3, 2), torch.float32, seed))
            self.live_changed()

    @precondition(lambda self: self.live_is_free)
    @rule(seed=seeds, assign=st.booleans())
    def load_into_the_model(self, seed: int, assign: bool) -> None:
        """``model.load_state_dict``; with ``assign`` where that does not part what is tied."""
        state = {}
        for number, (name, tensor) in enumerate(self.model.state_dict().items()):
            state[name] = random(tensor.shape, tensor.dtype, seed + number)
        live = self.reference.live
        tied = any(len(names) > 1 for names in live.groups.values())
        assign = assign and not tied and self.swap is None
        self.model.load_state_dict(state, assign=assign)
        self.live_changed()

    # --- changes that cannot be followed --------------------------------------------------------

    def followed(self) -> bool:
        """Whether the next update goes on from averages."""
        after = self.options["update_after_step"]
        return self.swap is None and self.reference.started and self.reference.step >= after

    @precondition(lambda self: self.followed() and bool(self.reference.averaged))
    @rule(pick=picks, same_bytes=st.booleans())
    def resize(self, pick: int, same_bytes: bool) -> None:
        first = choose(self.reference.averaged, pick)
        tensor = self.reference.live.tensors[first].tensor
        kept = tensor.data
        shape = (*tensor.shape, 2)
        if same_bytes and not KNOWN_FAULT_SAME_BYTES:
            shape = (tensor.numel(), 1) if tensor.dim() == 1 else (tensor.numel(),)
        tensor.data = torch.zeros(shape, dtype=tensor.dtype)
        if tensor.nbytes == kept.nbytes and KNOWN_FAULT_SAME_BYTES:
            tensor.data = kept
            return
        with self.refused(ModelError, "shape"):
            self.ema.update()
        tensor.data = kept

    @precondition(lambda self: self.followed())
    @rule(pick=picks)
    def remove(self, pick: int) -> None:
        names = [name for name in self.reference.averaged if name in self.reference.live.parameters]
        if not names:
            return
        kept = []
        for name in self.reference.live.groups.get(choose(names, pick), ()):
            path, _, key = name.rpartition(".")
            module = self.model.get_submodule(path)
            if key in module._parameters:
                kept.append((module, dict(module._parameters)))
                delattr(module, key)
        if kept:
            with self.refused(ModelError):
                self.ema.update()
        for module, parameters in reversed(kept):
            module._parameters.clear()
            module._parameters.update(parameters)

    @precondition(lambda self: self.followed() and not KNOWN_FAULT_EXCHANGED_PARAMETERS)
    @rule(pick=picks, other=picks)
    def exchange_parameters(self, pick: int, other: int) -> None:
        """Two ``Parameter`` objects change names: the update is refused, or each is itself."""
        places = [
            (module, key)
            for module, key in self.places()
            if self.known_alone(getattr(module, key)) in self.reference.averaged
        ]
        if not places:
            return
        (home, name), (guest, key) = choose(places, pick), choose(places, other)
        one, two = getattr(home, name), getattr(guest, key)
        if one is two or one.shape != two.shape:
            return
        first, second = self.known_alone(one), self.known_alone(two)
        setattr(home, name, two)
        setattr(guest, key, one)
        before = self.reference.saved()
        try:
            self.ema.update()
        except ModelError:
            setattr(home, name, one)
            setattr(guest, key, two)
            self.must_read = True
            return
        self.reference = before
        for tracks in before.tracks.values():
            tracks[first], tracks[second] = tracks[second], tracks[first]
        self.live_changed()
        self.modules.clear()  # they go on with the names that they have
        before.update()

    def known_alone(self, parameter: Tensor) -> str | None:
        """The name of a parameter that has one name only."""
        live = self.reference.live
        names = [name for name, seen in live.tensors.items() if seen.tensor is parameter]
        return names[0] if live.groups.get(names[0]) == names[:1] else None

    # --- swaps ------------------------------------------------------------------------------------

    @rule(
        pick=picks,
        seed=seeds,
        elsewhere=st.sampled_from((False, False, True)),
        assign=st.booleans(),
        block=st.booleans(),
    )
    def swap_in(self, pick: int, seed: int, elsewhere: bool, assign: bool, block: bool) -> None:
        """Begin a block or call ``apply_ema``; within the same average's that does nothing."""
        label = choose(self.reference.labels, pick)
        target = self.twin(seed) if elsewhere else self.model
        if self.swap is not None and seed % 2:
            target = self.swap.target
        asked = self.ema.use_ema(
            None if target is self.model else target, name=label, assign=assign
        )
        if self.swap is not None and not self.swap.is_of(label, target):
            with self.refused(StateError, "swapped"):
                asked.__enter__()
            return
        if self.swap is None:
            self.swap = Swapped(self.reference, label, target, assign=assign)
            self.applied = not block
        if block:
            assert asked.__enter__() is target
            self.blocks.append(asked)
        else:
            model = None if target is self.model else target
            self.ema.apply_ema(model, name=label, assign=assign)

    def twin(self, seed: int) -> nn.Module:
        """Another model of the same kind, with its own values."""
        other = through_a_file(self.model)
        if self.swap is None:
            with torch.no_grad():
                for number, tensor in enumerate(other.parameters()):
                    tensor.copy_(random(tensor.shape, tensor.dtype, seed + number))
        return other

    @precondition(lambda self: bool(self.blocks))
    @rule(raising=st.booleans())
    def leave(self, raising: bool) -> None:
        """The innermost block, perhaps by an exception."""
        error = (KeyError, KeyError("x"), None) if raising else (None, None, None)
        block = self.blocks.pop()
        try:
            assert not block.__exit__(*error)
        except KeyError:
            assert raising
        if not self.blocks and not self.applied:
            self.end_swap()

    @precondition(
        lambda self: (
            len(self.blocks) > 1 and not self.applied and not KNOWN_FAULT_EXITS_OUT_OF_ORDER
        )
    )
    @rule()
    def leave_out_of_order(self) -> None:
        """The outermost block first: live weights are back, and the others' exits do nothing."""
        outer, *inner = self.blocks
        with self.refused(StateError):
            outer.__exit__(None, None, None)
        self.end_swap()
        self.blocks = []
        self.check_models()
        for block in reversed(inner):
            block.__exit__(None, None, None)

    @precondition(lambda self: not self.blocks)
    @rule()
    def restore(self) -> None:
        if not self.applied:
            with self.refused(StateError, "apply_ema before"):
                self.ema.restore_original()
            return
        self.ema.restore_original()
        self.end_swap()

    def end_swap(self) -> None:
        """Live weights are back."""
        if self.swap is not None and self.swap.target is not self.model:
            self.swap.before.check(self.swap.target)
        self.swap, self.applied = None, False
        self.reference.look()

    @precondition(lambda self: self.swap is None)
    @rule()
    def another_average_is_swapped_in(self) -> None:
        """Then this one does not take its values for live weights."""
        names = [n for n in self.reference.averaged if n in self.reference.live.parameters]
        if not names or names[0] not in self.reference.live.groups:
            return
        other = EMAModel(self.model, 0.5, include=names[0])
        with other.use_ema():
            for call in (self.ema.update, self.ema.reset):
                with self.refused(StateError, "another average"):
                    call()

    # --- states -----------------------------------------------------------------------------------

    def may_save(self) -> bool:
        """Whether what is saved now can be loaded and read."""
        return self.reference.started or not KNOWN_FAULT_LOADED_BEFORE_START

    @precondition(lambda self: self.may_save())
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

    def loadable(self) -> list[tuple[str, Any, Reference]]:
        """States of the model as it is now: with the same parameters and ties."""
        groups = self.reference.live.groups
        return [state for state in self.states if state[2].live.groups == groups]

    @precondition(lambda self: self.swap is None and bool(self.loadable()))
    @rule(pick=picks, fresh=st.sampled_from(("no", "same model", "other model")))
    def load(self, pick: int, fresh: str) -> None:
        """Go on from a state: this object, a new one, or a new one with a model of its own."""
        how, stored, state = choose(self.loadable(), pick)
        if fresh != "no" and not Reference(self.model, self.options).wanted():
            return  # there is no EMAModel without anything to average
        if KNOWN_FAULT_LATE_INCLUDE and self.reference.late(state.averaged):
            return
        if KNOWN_FAULT_SEVERAL_FROM_FILES and how == "files" and len(stored) > 1:
            new = Reference(self.model, self.options)
            now = self.reference.averaged if fresh == "no" else new.wanted()
            if set(now) != set(state.averaged):
                return
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
        if KNOWN_FAULT_NARROW_COPIES and self.reference.is_wider_than_new():
            return
        if KNOWN_FAULT_LATE_INCLUDE and (
            self.reference.late(self.reference.averaged)
            or any(self.tied_by_memory(seen.tensor) for seen in live.tensors.values())
        ):
            return
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

    # --- averages go elsewhere --------------------------------------------------------------------

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

    @precondition(lambda self: self.swap is None or not self.swap.cast_since)
    @rule()
    def call_the_teacher(self) -> None:
        """A forward pass sees averages, and everything else as it is, and leaves no trace."""
        calls = self.model.calls
        if self.reference.labels != [None]:
            with self.refused(StateError, "one average"):
                self.ema()
            return
        output = self.ema()
        if KNOWN_FAULT_TEACHER_ATTRIBUTES:
            for module in self.model.modules():
                module.calls = calls
        shown, live = self.reference.shown(None), self.reference.live
        expected = {
            name: shown.get(first, live.value(first))
            for first, names in live.groups.items()
            for name in names
        }
        assert_same("the teacher", output, expected)

    @precondition(lambda self: self.swap is None or not self.swap.cast_since)
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

    @rule()
    def read(self) -> None:
        self.check_state(self.ema.state_dict())
        self.must_read = True


class AveragedModule:
    """A copy of the model, and what it shows since it was brought up to date.

    Args:
        module: the copy.
        label: the average that it shows.
    """

    def __init__(self, module: nn.Module, label: str | None) -> None:
        self._module = module
        self._label = label

    def follow(self, reference: Reference) -> None:
        """It shows averages, and what is not averaged as it is now, in the dtypes of the model."""
        shown, live = reference.shown(self._label), reference.live
        self._expected = {
            name: shown.get(first, live.value(first)).clone()
            for first, names in live.groups.items()
            for name in names
        }
        self._reference, self._live = reference, live

    def check(self) -> None:
        """It shows that still: averages have not changed, and the rest is a copy."""
        reference = self._reference
        if not reference.started and reference.live is not self._live:
            return  # it refers to memory of the live model, which has changed
        assert not any(parameter.requires_grad for parameter in self._module.parameters())
        assert_same("the averaged module", self._module(), self._expected)


class Swapped:
    """Averages in a model, and what it held before.

    Args:
        reference: of the average.
        label: which one.
        target: the model.
        assign: whether parameters may refer to other memory for the time.
    """

    def __init__(
        self, reference: Reference, label: str | None, target: nn.Module, *, assign: bool
    ) -> None:
        self.label = label
        self.target = target
        self.cast_since = False
        live = target is reference.model
        self.before = reference.live if live else Snapshot(target)
        averages = reference.averages(label)
        if live and not reference.started:  # they are in it already
            averages = {}
        self.shown = {
            name: value.to(self.before.value(name).dtype) for name, value in averages.items()
        }
        names = [name for first in averages for name in self.before.groups[first]]
        self._moved = set(names if assign else ())
        self._below = {name: self.before.value(name) for name in names}

    def is_of(self, label: str | None, target: nn.Module) -> bool:
        """Whether this is the swap of that average into that model."""
        return self.label == label and self.target is target

    def check(self) -> None:
        """The model shows the averages, and all else is as it was."""
        self.before.check(self.target, self.shown, moved=self._moved)

    def follow_cast(self) -> Snapshot:
        """The model was cast: what lies below the averages is cast once, when it comes back.

        Returns:
            What the model must hold then.
        """
        before, after = self.before, Snapshot(self.target)
        for name, seen in before.tensors.items():
            now = after.tensors[name]
            unchanged = now.value.dtype == seen.value.dtype
            value = self._below.get(name, seen.value).to(now.value.dtype)
            after.tensors[name] = seen if unchanged else now._replace(value=value)
        shown = {
            name: self.shown[first]
            for first, names in before.groups.items()
            if first in self.shown
            for name in names
        }
        self.shown = {
            name: value.to(after.value(name).dtype)
            for name, value in shown.items()
            if name in after.groups
        }
        self.before = after
        return after


def through_a_file(thing: Any) -> Any:
    """What comes back from ``torch.save``: ties and memory orders are kept."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=isinstance(thing, dict))


def machine_of(family: str) -> type[Machine]:
    """The machine that draws the options of this family."""
    return type(
        f"{family.capitalize()}Machine", (Machine,), {"family": family, "examples": 0, "steps": 0}
    )
