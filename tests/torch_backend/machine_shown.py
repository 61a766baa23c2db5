"""What a model shows that averages were swapped into, and what an averaged module shows."""

from torch import nn

from tests.torch_backend.machine_reference import Reference, Snapshot, assert_same

__all__ = ["AveragedModule", "Swapped"]


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
        live = reference.live
        # before the start it refers to the live weights, which averages may round
        shown = reference.shown(self._label) if reference.started else {}
        self._expected = {
            name: shown.get(first, live.value(first)).clone()
            for first, names in live.groups.items()
            for name in names
        }
        self._reference, self._live, self._started = reference, live, reference.started

    def check(self) -> None:
        """It shows that still: averages have not changed, and the rest is a copy."""
        if not self._started and self._reference.live is not self._live:
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
