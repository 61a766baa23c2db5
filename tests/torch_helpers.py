"""Models and comparisons that the tests of the PyTorch backend share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Small", "another", "assert_same", "step", "values"]


class Small(nn.Module):
    """Two linear layers around a BatchNorm: parameters, float buffers and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 2)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


another = Small
"""Makes a further model of the same class."""


def step(model: nn.Module, scale: float = 1.0) -> None:
    """A step of training, as far as an average can tell."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter) * scale)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters of a model."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Two mappings of tensors are equal bit for bit."""
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
