"""Averages into a model and the live weights back, in place, wholly or not at all.

Where an average has the dtype of its parameter the two change places, a chunk at a time through
one small buffer: no third copy. Elsewhere the live values are kept aside, in their own dtype.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from ema.errors import StateError
from ema.torch_backend.memory import CHUNK, flat, is_dense
from ema.torch_backend.selection import Selection
from ema.torch_backend.sharding import fully_sharded, local_of, reshard
from ema.torch_backend.steps import Progress, Step

__all__ = ["Swap"]

_swapped_in: weakref.WeakValueDictionary[int, Swap] = weakref.WeakValueDictionary()
"""By ``id`` of a parameter: the swap that has put an average into it, while it is alive."""


class Swap:
    """The averages and the parameters of one model, ready to change places.

    Args:
        model: is held for as long as the swap.
        averages: by name.
        params: the parameters of the same names and shapes; of a sharded one, the part here has
            the shape of its average.
        found: the tensors of the averaged model, for those who ask during the swap.
        name: of the averages, where there are several.

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
        name: str | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self.found = found
        self._params = dict(params)
        self._averages = dict(averages)
        self._views = {name: local_of(tensor) for name, tensor in params.items()}
        self._gathering = fully_sharded(model.modules())
        self._exchanged: set[str] = set()
        for key, tensor in self._params.items():
            holder = _swapped_in.get(id(tensor))
            if holder is not None and holder.active:
                raise StateError(f"another average is swapped into `{key}`: restore it first")
            if tensor.is_inference():
                raise StateError(f"`{key}` was made in inference mode and cannot be written")
        # the buffers may be used in another mode than this one
        with torch.inference_mode(mode=False):
            self._parts = self._prepare()
        self._into: Progress | None = None
        self._back: Progress | None = None

    @property
    def active(self) -> bool:
        """Whether the model may hold averages instead of live weights."""
        return self._into is not None and not (self._back is not None and self._back.finished)

    def apply(self) -> None:
        """Put the averages in; if anything is raised, the live weights are back before."""
        try:
            reshard(self._gathering)
            _swapped_in.update({id(tensor): self for tensor in self._params.values()})
            self._into = Progress(chain.from_iterable(into for into, _ in self._parts))
            self._into.run()
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put the live weights back; nothing happens where they are."""
        if not self.active:
            return
        try:
            self._restore()
        except BaseException:
            self._restore()  # every step can be made again, and Ctrl-C comes once
            raise

    def averages(self) -> dict[str, Tensor]:
        """The averages, wherever they are now."""
        if not self.active:
            return dict(self._averages)
        return {
            name: self._views[name] if name in self._exchanged else average
            for name, average in self._averages.items()
        }

    def _restore(self) -> None:
        reshard(self._gathering)
        if self._back is None:
            self._back = Progress(self._way_back())
        self._back.run()
        for name, tensor in self._params.items():
            view, here = self._views[name], local_of(tensor)
            if here.data_ptr() != view.data_ptr():  # moved or cast meanwhile
                here.copy_(view)

    def _way_back(self) -> list[Step]:
        """Finish the part that was begun, first of all, and undo every part."""
        done = 0 if self._into is None else self._into.done
        begun: list[list[Step]] = []
        for into, back in self._parts:
            if done <= 0:
                break
            begun.append([*into[done:], *back])
            done -= len(into)
        # the latest first: the buffer still holds what that part has put there
        return list(chain.from_iterable(reversed(begun)))

    def _prepare(self) -> list[tuple[list[Step], list[Step]]]:
        """Steps into the model and back, a part for each chunk."""
        parts: list[tuple[list[Step], list[Step]]] = []
        buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for name, average in self._averages.items():
            view = self._views[name]
            exchange = (
                average.dtype == view.dtype
                and average.device == view.device
                and average.stride() == view.stride()
                and is_dense(view)
            )
            if not exchange:
                kept = torch.empty_like(view)  # in the dtype of the parameter
                into: list[Step] = [partial(kept.copy_, view), partial(view.copy_, average)]
                parts.append((into, [partial(view.copy_, kept)]))
                continue
            self._exchanged.add(name)
            ours, theirs = flat(average), flat(view)
            if (key := (ours.device, ours.dtype)) not in buffers:
                largest = max(tensor.numel() for tensor in self._averages.values())
                size = min(CHUNK, 2 * largest)  # a complex number is two reals
                buffers[key] = torch.empty(size, dtype=ours.dtype, device=ours.device)
            for start in range(0, ours.numel(), CHUNK):
                a, p = ours[start : start + CHUNK], theirs[start : start + CHUNK]
                kept = buffers[key][: a.numel()]
                both: list[Step] = [
                    partial(kept.copy_, p),
                    partial(p.copy_, a),
                    partial(a.copy_, kept),
                ]
                parts.append((both, both))
        return parts
