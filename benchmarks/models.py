"""The models that are averaged, and the limits of the machine as contenders."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.setting import DECAY, Setting
from benchmarks.timing import Contender

__all__ = ["WEIGHT", "Buffers", "bare_foreach", "count", "gpt2", "size", "vectors"]

WEIGHT = 1 - DECAY
TINY = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 16}
TINY |= {"bos_token_id": 0, "eos_token_id": 0}
GPT2_XL = {"n_embd": 1600, "n_head": 25}


def gpt2(setting: Setting, *, copies: int = 12) -> nn.Module:
    """GPT-2 with random weights.

    On a CPU the small one, 124 M in 148 tensors (quick: 2 of its 12 layers, 54 M). On an
    accelerator XL, 1.56 B in 580 tensors, or as many layers as leave room for so many copies.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    if setting.size == "tiny":
        options = TINY
    elif setting.on_cpu:
        options = {"n_layer": 12 if setting.size == "full" else 2}
    else:
        embeddings, layer = (50257 + 1024) * 1600, 12 * 1600**2 + 13 * 1600
        layers = (setting.room(copies=copies) - embeddings) // layer
        wanted = 48 if setting.size == "full" else 4
        options = GPT2_XL | {"n_layer": max(1, min(wanted, layers))}
    with torch.device(setting.device):
        return GPT2LMHeadModel(GPT2Config(**options))


def vectors(
    elements: int, setting: Setting, *, tensors: int = 1, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """So many elements in vectors of one length."""
    options = {"device": setting.device, "dtype": dtype}
    parts = (torch.randn(elements // tensors, **options) for _ in range(tensors))
    return nn.ParameterList(nn.Parameter(part) for part in parts)


def count(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(p.numel() for p in model.parameters())


def size(model: nn.Module) -> str:
    """Elements and tensors, for a title."""
    tensors, elements = list(model.parameters()), count(model)
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    shown = f"{elements / 1e6:.3g} M" if elements < 1e9 else f"{elements / 1e9:.3g} B"
    return f"{shown} {dtype} in {len(tensors)} tensor{'s' * (len(tensors) > 1)}"


def bare_foreach(model: nn.Module) -> Contender:
    """One ``_foreach_lerp_`` on lists that were made before, without any check."""
    params = [p.detach() for p in model.parameters()]
    averages = [p.clone() for p in params]
    lerp = partial(torch._foreach_lerp_, averages, params, WEIGHT)
    return Contender("bare foreach", lerp, kind="limit")


class Buffers:
    """Two flat buffers of the size of the model."""

    def __init__(
        self, model: nn.Module, setting: Setting, dtype: torch.dtype = torch.float32
    ) -> None:
        self.params = torch.randn(count(model), device=setting.device, dtype=dtype)
        self.average = self.params.clone()

    def lerp(self, name: str = "flat lerp") -> Contender:
        """``lerp_`` from one into the other: reads both, writes one."""
        lerp = partial(self.average.lerp_, self.params, WEIGHT)
        return Contender(name, lerp, kind="limit", traffic=3 * self.params.nbytes)

    def copy(self) -> Contender:
        """``copy_`` from one into the other: the bandwidth of reading and writing."""
        copy = partial(self.average.copy_, self.params)
        return Contender("flat copy", copy, kind="limit", traffic=2 * self.params.nbytes)
