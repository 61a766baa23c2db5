"""Return live values to tensors that were cast, moved or replaced while averages were in them.

A swap puts the live values back into the memory that they came from. ``model.double()`` inside the
swap leaves that memory: parameters refer to another one, each of those that were tied by memory to
one of its own, and the modules get new buffers. All of these hold averages until the live values
are copied to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from operator import setitem
from typing import Any

import torch
from torch import Tensor, nn

from ema.torch_backend.calls import Call
from ema.torch_backend.tensors.copying import has_memory
from ema.torch_backend.tensors.memory import PLAIN
from ema.torch_backend.tensors.sharding import is_sharded, local_of

__all__ = ["Places"]


class Places:
    """Where the modules of a model keep the tensors of a swap, under every name that these have.

    Args:
        model: is walked through once.
        params: its tensors that averages are put into, by name.
        shown: of the same names, the memory that they may refer to during the swap.
    """

    def __init__(
        self, model: nn.Module, params: Mapping[str, Tensor], shown: Mapping[str, Tensor]
    ) -> None:
        by_memory = {_memory(tensor): shown[name] for name, tensor in params.items()}
        self._places = [
            _Place(holder, key, tensor, by_memory[memory])
            for module in (model.modules() if params else ())
            for holder in (module._parameters, module._buffers)
            for key, tensor in holder.items()
            if tensor is not None and (memory := _memory(tensor)) in by_memory
        ]

    def returning(self) -> list[Call]:
        """Steps that copy the live values to the tensors that have left their memory.

        Make them when the values are back in that memory; each can be made again.
        """
        return [step for place in self._places for step in place.returning()]


class _Place:
    """A key of a module's dict, and the tensor that was there when the swap was prepared."""

    def __init__(
        self, holder: MutableMapping[str, Any], key: str, tensor: Tensor, shown: Tensor
    ) -> None:
        self._holder = holder
        self._key = key
        self._tensor = tensor
        self._live = local_of(tensor)  # keeps the memory, to which the live values return
        self._shown = shown

    def returning(self) -> Iterator[Call]:
        # a scripted module has another mapping in place of a dict, without `get`
        now = self._holder[self._key] if self._key in self._holder else None  # noqa: SIM401
        if self._has_left(self._tensor):
            yield self._copied_into(self._tensor) or self._referring(self._tensor)
        if now is None or now is self._tensor or not self._has_left(now):
            return
        if _shares_storage(now, self._shown):
            yield self._referring(now)
        elif not isinstance(now, nn.Parameter):
            yield self._copied_into(now) or self._instead_of(now)
        elif self._was_converted(now) and (step := self._copied_into(now)):
            yield step

    def _has_left(self, tensor: Tensor) -> bool:
        """Whether the live values are elsewhere than ``tensor``."""
        if type(tensor) in PLAIN and tensor.layout == torch.strided:  # so for nearly all
            return tensor.data_ptr() != self._live.data_ptr()
        if not has_memory(tensor):
            return bool(self._live.numel())
        return local_of(tensor).data_ptr() != self._live.data_ptr()

    def _was_converted(self, now: Tensor) -> bool:
        """Whether a parameter was made from the one before it, and not set by the user."""
        kind = now.dtype, now.device
        return (
            kind != (self._live.dtype, self._live.device)
            or torch.__future__.get_overwrite_module_params_on_conversion()
        )

    def _copied_into(self, tensor: Tensor) -> Call | None:
        """The live values in the dtype and on the device of ``tensor``; None if it cannot be."""
        known = type(tensor) in PLAIN or is_sharded(tensor) or type(tensor) is type(self._tensor)
        if not known or tensor.layout != torch.strided or _shares_storage(tensor, self._shown):
            return None
        here = local_of(tensor)
        frozen_by_mode = here.is_inference() and not isinstance(tensor, nn.Parameter)
        fits = here.shape == self._live.shape and not frozen_by_mode
        return partial(here.copy_, self._live) if fits else None

    def _referring(self, tensor: Tensor) -> Call:
        """``tensor`` refers to the memory of the live values again."""
        return partial(setattr, tensor, "data", self._live)

    def _instead_of(self, now: Tensor) -> Call:
        """A buffer of its own comes to the place of one that cannot be written."""
        buffer = self._tensor
        if now.shape == self._live.shape:
            with torch.inference_mode(mode=False):
                buffer = self._live.to(now.device, now.dtype, copy=True)
        return partial(setitem, self._holder, self._key, buffer)


def _memory(tensor: Tensor) -> object:
    """Equal for plain tensors that begin at the same address; others are known by themselves."""
    if type(tensor) in PLAIN and tensor.layout == torch.strided and (address := tensor.data_ptr()):
        return (address,)
    return id(tensor)


def _shares_storage(one: Tensor, other: Tensor) -> bool:
    plain = type(one) in PLAIN and type(other) in PLAIN and one.layout == torch.strided
    return plain and bool(one.numel()) and _storage(one) == _storage(other)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
