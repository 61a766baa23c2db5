"""Rules: averages are swapped in and live weights come back."""

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from ema import EMAModel, StateError
from tests.torch_backend.machine_base import Base, choose, picks, seeds
from tests.torch_backend.machine_shown import Swapped

__all__ = ["Swaps"]


class Swaps(Base):
    """Blocks, ``apply_ema`` and ``restore_original``, into the live model or another one."""

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

    @precondition(lambda self: len(self.blocks) > 1 and not self.applied)
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
