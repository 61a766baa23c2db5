"""The models that are averaged, and the limits of the machine as contenders."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.setting import DECAY, Setting
from benchmarks.timing import Contender

__all__ = ["WEIGHT", "Buffers", "bare_foreach", "count", "gpt2", "many_small", "one_tensor"]
__all__ += ["size", "split"]

WEIGHT = 1 - DECAY
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0}
TINY = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 16, **SPECIAL}
GPT2_XL = {"n_layer": 48, "n_embd": 1600, "n_head": 25}


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


def many_small(setting: Setting, *, in_modules: bool = False) -> nn.Module:
    """1 000 vectors of 256 in one list, or two in each of 500 modules."""
    vectors = 1_000 if setting.size != "tiny" else 16
    if not in_modules:
        return split(vectors * 256, vectors, setting)
    norms = (nn.LayerNorm(256, device=setting.device) for _ in range(vectors // 2))
    model = nn.Sequential(*norms)
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def split(elements: int, tensors: int, setting: Setting) -> nn.Module:
    """So many elements in vectors of one length."""
    vectors = [torch.randn(elements // tensors, device=setting.device) for _ in range(tensors)]
    return nn.ParameterList([nn.Parameter(vector) for vector in vectors])


def one_tensor(elements: int, setting: Setting, dtype: torch.dtype = torch.float32) -> nn.Module:
    """All elements in one vector."""
    vector = torch.randn(elements, device=setting.device, dtype=dtype)
    return nn.ParameterList([nn.Parameter(vector)])


def count(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(p.numel() for p in model.parameters())


def size(model: nn.Module) -> str:
    """Elements and tensors, for a title."""
    tensors = list(model.parameters())
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    elements = (
        f"{count(model) / 1e6:.3g} M" if count(model) < 1e9 else f"{count(model) / 1e9:.3g} B"
    )
    return f"{elements} {dtype} in {len(tensors)} tensor{'s' * (len(tensors) > 1)}"


def bare_foreach(model: nn.Module) -> Contender:
    """One ``_foreach_lerp_`` on lists that were made before, without any check."""
    params = [p.detach() for p in model.parameters()]
    averages = [p.clone() for p in params]
    return Contender(
        name="bare foreach",
        call=lambda: torch._foreach_lerp_(averages, params, WEIGHT),
        kind="limit",
    )


class Buffers:
    """Two flat buffers of the size of the model."""

    def __init__(self, elements: int, setting: Setting, dtype: torch.dtype = torch.float32) -> None:
        self.params = torch.randn(elements, device=setting.device, dtype=dtype)
        self.average = self.params.clone()

    def lerp(self, name: str = "flat lerp") -> Contender:
        """``lerp_`` from one into the other: reads both, writes one."""
        return Contender(
            name=name,
            call=lambda: self.average.lerp_(self.params, WEIGHT),
            kind="limit",
            traffic=3 * self.params.nbytes,
        )

    def copy(self, *, times: int = 1) -> Contender:
        """``copy_`` from one into the other: the bandwidth of reading and writing."""

        def copy() -> None:
            for _ in range(times):
                self.average.copy_(self.params)

        return Contender(
            name="flat copy" if times == 1 else f"{times} flat copies",
            call=copy,
            kind="limit",
            traffic=2 * times * self.params.nbytes,
        )
