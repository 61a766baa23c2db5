"""The models that are averaged."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

__all__ = ["gpt2", "many_small", "many_small_modules", "size"]


def many_small() -> nn.Module:
    """1 000 vectors of 256 in one list."""
    return nn.ParameterList([nn.Parameter(torch.randn(256)) for _ in range(1_000)])


def many_small_modules() -> nn.Module:
    """The same, two in each of 500 modules."""
    model = nn.Sequential(*(nn.LayerNorm(256) for _ in range(500)))
    for p in model.parameters():
        nn.init.normal_(p)
    return model


def gpt2(*, quick: bool) -> nn.Module:
    """GPT-2 small with random weights: 124 M in 148 tensors; quick: 2 of its 12 layers, 54 M."""
    return GPT2LMHeadModel(GPT2Config(n_layer=2 if quick else 12))


def size(model: nn.Module) -> str:
    """Elements and tensors, for a title."""
    tensors = list(model.parameters())
    return f"{sum(p.numel() for p in tensors) / 1e6:.3g} M float32 in {len(tensors)} tensors"
