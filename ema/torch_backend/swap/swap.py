"""Put averages into a model and the live weights back, completely or not at all.

Parameters keep their memory, and the values change. If an average has the dtype of its parameter, the two
exchange their values, a chunk at a time through one small buffer, without a third copy. Otherwise the live
values are kept aside, in their own dtype. With ``assign`` no value moves: the parameters refer to the memory
of the averages until the swap ends.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from ema.errors import StateError
from ema.torch_backend.calls import Call, Progress, eager, run
from ema.torch_backend.swap.caches import clearing
from ema.torch_backend.swap.exchanges import (
    Assignment,
    Buffers,
    Copying,
    CopyingTogether,
    ExchangeByKernel,
    Move,
    alike,
    exchanges_on_accelerator,
    many_at_once,
)
from ema.torch_backend.swap.followers import repointing
from ema.torch_backend.swap.places import Places
from ema.torch_backend.tensors.memory import PLAIN
from ema.torch_backend.tensors.names import unwrap
from ema.torch_backend.tensors.selection import Selection
from ema.torch_backend.tensors.sharding import before_write, fully_sharded, local_of

__all__ = ["Swap", "any_swapped", "first_swapped", "holds_averages", "refuse_if_swapped"]

_swaps: weakref.WeakSet[Swap] = weakref.WeakSet()
"""The swaps that may have put averages into parameters, while they are alive."""


class Swap:
    """The averages and the parameters of one model, ready to change places.

    Args:
        model: is held for as long as the swap.
        averages: by name.
        params: the parameters of the same names and shapes; of a sharded one, the part here has
            the shape of its average.
        found: the tensors of the averaged model, which other calls read during the swap.
        name: of the averages, where there are several.
        assign: whether plain parameters that share their memory with no other refer to the averages.

    Raises:
        StateError: another average is in one of these parameters, or one of them cannot be
            written (an inference tensor).
    """

    def __init__(
        self,
        model: nn.Module,
        averages: Mapping[str, Tensor],
        params: Mapping[str, Tensor],
        found: Selection,
        *,
        name: str | None = None,
        assign: bool = False,
    ) -> None:
        self.model = model
        self.name = name
        self.found = found
        self.params = dict(params)
        self._averages = dict(averages)
        self._assigned = _sole(model, params) if assign else {}
        self._views = {key: local_of(tensor) for key, tensor in params.items()}
        self._gathering = fully_sharded(model.modules())
        self._exchanged: set[str] = set()
        self._shown: dict[str, Tensor] = {}  # memory that is assigned
        self._moved: list[tuple[Tensor, Tensor]] = []  # memory, and where its values go
        refuse_if_swapped(self.params)
        for key, tensor in self.params.items():
            if tensor.is_inference():
                raise StateError(f"`{key}` was made in inference mode and cannot be written")
        # the buffers may be used in another mode than this one
        with torch.inference_mode(mode=False):
            self._moves = self._prepare()
            self._repointed = repointing(self._moved)
            # tensors that refer to other memory during the swap are looked up where they are now
            early = self._assigned or self._repointed.tensors
            self._places = self._look_for_places() if early else None
            self._moves.append(self._repointed)
        # of which PyTorch does not see that their values change
        self._written_unseen = [*self._assigned.values(), *self._repointed.tensors]
        self._written_unseen += self._exchanged_together
        self._into: Progress | None = None
        self._back: Progress | None = None

    @property
    def active(self) -> bool:
        """Whether the model may hold averages instead of live weights."""
        return self._into is not None and not (self._back is not None and self._back.finished)

    def apply(self) -> None:
        """Put the averages in; if anything is raised, the live weights are back before."""
        try:
            self._apply()
        except BaseException:
            self.restore()
            raise

    @eager
    def restore(self) -> None:
        """Put the live weights back; nothing happens where they are."""
        if not self.active:
            return
        try:
            self._restore()
        except BaseException:
            self._restore()  # every step can be made again, and Ctrl-C comes once
            raise

    def again(self) -> Swap | None:
        """This swap made ready for use again, or None if a new one must be prepared.

        It can where kernels exchange everything, and the memory is where it was.
        """
        whole = self._back is not None and self._back.finished
        *moves, _ = self._moves
        if not whole or not moves or self._repointed.tensors or repointing(self._moved).tensors:
            return None
        if not all(isinstance(move, ExchangeByKernel) and move.is_ready() for move in moves):
            return None
        for tensor, view in zip(self.params.values(), self._views.values(), strict=True):
            here = tensor if type(tensor) in PLAIN else local_of(tensor)
            if here.data_ptr() != view.data_ptr():
                return None
        swap = copy.copy(self)
        swap.rewind()
        return swap

    def rewind(self) -> None:
        """Be a swap that has not begun."""
        self._into = self._back = self._places = None

    def averages(self) -> dict[str, Tensor]:
        """The averages, wherever they are now."""
        if not self.active or not (self._into and self._into.done):
            return dict(self._averages)
        return {
            name: self._views[name] if name in self._exchanged else average
            for name, average in self._averages.items()
        }

    @eager
    def _apply(self) -> None:
        before_write(self._gathering)
        _swaps.add(self)
        self._into = Progress(_noticed(chain.from_iterable(move.into for move in self._moves)))
        self._into.run()
        increment_version(self._written_unseen)
        if self._places is None:  # now: an accelerator is at work meanwhile
            with torch.inference_mode(mode=False):
                self._places = self._look_for_places()

    def _restore(self) -> None:
        before_write(self._gathering)
        if self._back is None:
            self._back = Progress(_noticed(self._way_back()))
        self._back.run()
        # graphs built before must not be used now
        increment_version(self._written_unseen)
        # without places no block ran in which a tensor could leave its memory
        if self._places is not None and (returning := self._places.returning()):
            run(_noticed(returning))
        _swaps.discard(self)

    def _look_for_places(self) -> Places:
        return Places(self.model, self.params, {**self._averages, **self._shown})

    def _way_back(self) -> list[Call]:
        """Finish the move that was begun, then undo every move."""
        done = 0 if self._into is None else self._into.done
        begun: list[list[Call]] = []
        for move in self._moves:
            if done <= 0:
                break
            begun.append([*move.into[done:], *move.back()])
            done -= len(move.into)
        # the latest first: the buffer still holds what that move has put there
        return list(chain.from_iterable(reversed(begun)))

    def _prepare(self) -> list[Move]:
        moves: list[Move] = []
        buffers = Buffers(max((tensor.numel() for tensor in self._averages.values()), default=0))
        together: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        copied: dict[tuple[torch.device, torch.device], list[tuple[Tensor, Tensor]]] = {}
        for name, average in self._averages.items():
            view = self._views[name]
            if name in self._assigned:
                assignment = Assignment(self.params[name], average)
                self._shown[name] = assignment.shown
                moves.append(assignment)
            elif alike(average, view):
                self._exchanged.add(name)
                self._moved += [(average, view), (view, average)]
                if many_at_once(view.device):
                    together.setdefault(view.device, []).append((view, average))
                else:
                    moves.extend(buffers.exchanges(view, average))
            elif many_at_once(view.device):
                copied.setdefault((view.device, average.device), []).append((view, average))
            else:
                copying = Copying(view, average)
                self._moved.append((view, copying.kept))
                moves.append(copying)
        for pairs in together.values():
            moves.extend(exchanges_on_accelerator(pairs))
        for pairs in copied.values():
            views, averages = map(list, zip(*pairs, strict=True))
            copying_all = CopyingTogether(views, averages)
            self._moved += zip(views, copying_all.kept, strict=True)
            moves.append(copying_all)
        self._exchanged_together = [
            t for pairs in together.values() for pair in pairs for t in pair
        ]
        return moves


def any_swapped() -> bool:
    """Whether averages may be in some model of this process; looks at no tensor."""
    return bool(_swaps)


def holds_averages(model: nn.Module) -> bool:
    """Whether averages may be in this model, wrapped or not; calls no method of the model."""
    inner = unwrap(model)
    return any(swap.active and unwrap(swap.model) is inner for swap in list(_swaps))


def first_swapped(params: Mapping[str, Tensor]) -> str | None:
    """The name of the first of these tensors that holds an average now; None: all are live."""
    written = {
        id(tensor) for swap in list(_swaps) if swap.active for tensor in swap.params.values()
    }
    return next((name for name, tensor in params.items() if id(tensor) in written), None)


def refuse_if_swapped(params: Mapping[str, Tensor]) -> None:
    """Make sure that these tensors hold live weights.

    Raises:
        StateError: an average is in one of them.
    """
    if (name := first_swapped(params)) is not None:
        raise StateError(f"another average is swapped into `{name}`: restore it first")


def _noticed(calls: Iterable[Call]) -> Iterable[Call]:
    """Mark tensors as written, and empty PyTorch's caches of the values before."""
    return chain(calls, clearing())


def _sole(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain ones whose memory no other tensor of the model refers to."""
    holders: dict[int, set[int]] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        if type(tensor) in PLAIN:
            holders.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))
    return {
        key: tensor
        for key, tensor in params.items()
        if type(tensor) in PLAIN and holders[tensor.untyped_storage().data_ptr()] == {id(tensor)}
    }
