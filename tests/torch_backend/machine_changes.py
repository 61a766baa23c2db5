"""Rules: the model changes underneath, in ways that averages follow and in others."""

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor, nn

from ema import ModelError
from tests.torch_backend.machine_base import Base, choose, picks, seeds
from tests.torch_backend.machine_models import LAYOUTS, lay_out, random
from tests.torch_backend.machine_reference import trainable

__all__ = ["Changes"]


class Changes(Base):
    """Tensors are replaced, moved, cast, frozen, added, resized, removed and renamed."""

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
        if self.swap is not None and self.tied_by_memory(tensor):
            return  # a tie that is parted inside a swap is noticed after it
        tensor.data = lay_out(random(tensor.shape, tensor.dtype, seed), layout)
        self.live_changed()

    @precondition(lambda self: self.live_is_free)
    @rule(pick=picks, seed=seeds)
    def lay_out_at_the_same_address(self, pick: int, seed: int) -> None:
        """Other strides, or another dtype of as many bytes, where the tensor begins already."""
        module, key = choose(self.places(), pick)
        tensor = getattr(module, key)
        if self.tied_by_memory(tensor):
            return  # the reference knows what is tied by its strides
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

    @rule(dtype=st.sampled_from((torch.half, torch.bfloat16, torch.float, torch.double)))
    def cast(self, dtype: torch.dtype) -> None:
        """The whole model, also while averages are in it."""
        tensors = [seen.tensor for seen in self.reference.live.tensors.values()]
        if self.swap is not None and any(map(self.tied_by_memory, tensors)):
            return  # see above
        self.look()
        self.model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
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
        if same_bytes:
            shape = (tensor.numel(), 1) if tensor.dim() == 1 else (tensor.numel(),)
        tensor.data = torch.zeros(shape, dtype=tensor.dtype)
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

    @precondition(lambda self: self.followed())
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
        self.look()  # objects that were never seen under their names cannot be known under others
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
