"""The tensors that are averaged, each with its averages and everything that an update needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ema.errors import ModelError, difference
from ema.rounding import Stream
from ema.torch_backend.tensors.memory import allocate, is_dense
from ema.torch_backend.tensors.sharding import Box, box_of, is_sharded, local_of

__all__ = ["Tracked", "check_followed", "track"]


@dataclasses.dataclass(frozen=True, slots=True)
class Tracked:
    """One averaged tensor of a model, or the part of a sharded one that this rank holds.

    Attributes:
        averages: its averages, one or several; dense, of one dtype and one memory layout.
        remainders: one for each average if these are compensated, of the same form; else empty.
        live: the tensor, of the same shape; it may have any strides, dtype and device.
        box: which part of the whole tensor this is.
        stream: of the random bits of stochastic rounding; None rounds to nearest.
        address: where the memory of ``live`` began when the averages were bound to it.
    """

    averages: tuple[Tensor, ...]
    remainders: tuple[Tensor, ...]
    live: Tensor
    box: Box
    stream: Stream | None
    address: int

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """The averages and their remainders: all the memory that is kept for this tensor."""
        return self.averages + self.remainders

    def take(self, values: Mapping[str, Tensor], name: str, kept: Tensor) -> None:
        """Copy the part of a value that is here into ``kept``; zeros if the value is not given."""
        if name not in values:
            kept.zero_()
            return
        value = values[name]  # the value may be read from a file each time
        kept.copy_(box_of(value).part(local_of(value), self.box))


def track(
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, tuple[torch.device, torch.dtype]],
    streams: Mapping[str, Stream],
    before: Mapping[str, Tracked],
    *,
    number: int,
    compensated: bool,
) -> dict[str, Tracked]:
    """Averages for live tensors: their previous ones if these still fit, else new ones.

    A new average continues from the previous one if there is one; if the tensor was sharded since,
    from the part on this rank. Otherwise it starts as a copy of the live tensor, and its remainder
    as 0.

    Args:
        tensors: the live tensors by name, plain or sharded.
        kinds: by name, the device and dtype of the averages.
        streams: by name, for the averages that are rounded stochastically.
        before: by the same names, the tensors tracked so far.
        number: how many averages each tensor has.
        compensated: whether each average has a remainder.
    """
    live = {name: _here(tensor) for name, tensor in tensors.items()}
    boxes = {name: box_of(tensor) for name, tensor in tensors.items()}
    renewed = {
        name: tensor
        for name, tensor in live.items()
        if name not in before or not _suits(before[name], tensor, kinds[name], boxes[name])
    }
    averages = [allocate(renewed, kinds) for _ in range(number)]
    remainders = [allocate(renewed, kinds) for _ in range(number if compensated else 0)]
    tracked = {}
    for name, tensor in live.items():
        if name in renewed:
            kept = tuple(each[name] for each in averages), tuple(each[name] for each in remainders)
            _fill(*kept, tensor, boxes[name], before.get(name))
        else:
            kept = before[name].averages, before[name].remainders
        tracked[name] = Tracked(
            *kept, tensor, boxes[name], streams.get(name), address=tensor.data_ptr()
        )
    return tracked


def check_followed(
    before: Mapping[str, Tracked],
    tensors: Mapping[str, Tensor],
    origins: Mapping[str, str],
    *,
    all_go_on: bool,
) -> None:
    """Make sure that averages can follow their tensors.

    Args:
        before: the tensors tracked so far.
        tensors: the live tensors now.
        origins: name now to the name before, for each tensor that was tracked.
        all_go_on: whether it is an error if a tensor is gone.

    Raises:
        ModelError: lists every average that cannot follow its tensor.
    """
    still = set(origins.values())
    gone = [name for name in before if name not in still] if all_go_on else []
    phrases = [
        f"`{name}` is now the tensor that was called `{origins[name]}`, its own is gone"
        for name in gone
        if name in origins
    ]
    for name, origin in origins.items():
        phrases += _hindrances(name, tensors[name], before[origin], renamed_from=origin)
    if text := difference([name for name in gone if name not in origins], (), phrases):
        raise ModelError(f"the model has changed: {text}")


def _hindrances(name: str, tensor: Tensor, before: Tracked, renamed_from: str) -> Iterator[str]:
    """The reasons why an average cannot follow its tensor, in words."""
    if name != renamed_from and _here(tensor).data_ptr() != before.address:
        yield f"`{name}` was called `{renamed_from}` and lies in other memory than then"
    box = box_of(tensor)
    if box.shape != before.box.shape:
        yield f"`{name}` has shape {box.shape}, its average {before.box.shape}"
    elif not before.box.covers(box):
        yield f"`{name}` was sharded anew: save() before and load() after that keep its average"


def _here(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor on this rank; a plain tensor itself, whose memory may move."""
    return local_of(tensor) if is_sharded(tensor) else tensor


def _suits(before: Tracked, live: Tensor, kind: tuple[torch.device, torch.dtype], box: Box) -> bool:
    """Whether the averages from before have the form that new ones would have."""
    average = before.averages[0]
    same_layout = average.stride() == live.stride() or not is_dense(live)
    return before.box == box and (average.device, average.dtype) == kind and same_layout


def _fill(
    averages: tuple[Tensor, ...],
    remainders: tuple[Tensor, ...],
    live: Tensor,
    box: Box,
    before: Tracked | None,
) -> None:
    """Give new averages and remainders their first values."""
    if before is not None:
        for new, old in zip(averages + remainders, before.kept, strict=True):
            new.copy_(before.box.part(old, box))
        return
    for average in averages:
        average.copy_(live.detach())
    for remainder in remainders:
        remainder.zero_()
