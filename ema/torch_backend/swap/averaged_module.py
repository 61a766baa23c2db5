"""Modules of the same class as the model that show an average and follow every update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ema.errors import ModelError, listing
from ema.torch_backend.swap.deep_copies import copy_of
from ema.torch_backend.swap.followers import Follower, can_share, sources
from ema.torch_backend.tensors.names import unwrap
from ema.torch_backend.tensors.selection import Selection
from ema.torch_backend.tensors.sharding import fully_sharded

__all__ = ["AveragedModules"]

Look = Callable[[int], tuple[dict[str, Tensor], Selection]]


class AveragedModules:
    """The modules that an ``EMAModel`` has made, while they are in use.

    Args:
        model: the live model.
        look: gives one of the averages by its index, and the tensors of the live model.
    """

    def __init__(self, model: nn.Module, look: Look) -> None:
        self._model = model
        self._look = look
        self._followers: list[Follower] = []

    def make(self, index: int, given: Mapping[int, Any]) -> nn.Module:
        """A module that shows an average from now on.

        Args:
            index: which of several averages.
            given: by ``id`` of an object within the model, its replacement in the copy.

        Raises:
            ModelError: the model cannot be copied.
        """
        # these tensors are written to in any mode
        with torch.inference_mode(mode=False), torch.no_grad():
            averages, found = self._look(index)
            _check_copyable(found)
            shared = {
                id(live): nn.Parameter(average, requires_grad=False)
                for _, live, average in sources(averages, found)
                if average is not None and type(live) is nn.Parameter and can_share(average, live)
            }
            computed = {
                id(buffer): buffer.detach().clone()
                for buffer in self._model.buffers()
                if not buffer.is_leaf
            }
            module = copy_of(unwrap(self._model), {**shared, **computed, **given})
            for parameter in module.parameters():
                parameter.requires_grad = False
            follower = Follower(module, self._model, index)
            follower.follow(averages, found)
            for child in module.modules():
                if isinstance(child, nn.RNNBase):
                    child.flatten_parameters()  # on CUDA, into memory of their own
            follower.follow(averages, found)
        self._followers.append(follower)
        return module

    def refresh(self) -> None:
        """Let the modules that are in use show the averages as they are now."""
        self._followers = [each for each in self._followers if each.module is not None]
        if not self._followers:
            return
        with torch.inference_mode(mode=False), torch.no_grad():
            for index in {follower.index for follower in self._followers}:
                averages, found = self._look(index)
                for follower in self._followers:
                    if follower.index == index:
                        follower.follow(averages, found)


def _check_copyable(found: Selection) -> None:
    if fully_sharded(found.modules):
        raise ModelError(
            "under fully_shard a module cannot be copied: call the model inside use_ema(), or"
            " copy_to() a model of your own"
        )
    unbuilt = [name for name, buffer in found.buffers.items() if is_lazy(buffer)]
    if unbuilt := sorted({*unbuilt, *found.pending}):
        raise ModelError(
            "averaged_module needs a model whose tensors have memory, got none yet for"
            f" {listing(unbuilt)}"
        )
