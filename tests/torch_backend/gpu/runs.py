"""A model with tensors of many shapes, a run of it, and an exact comparison of two states."""

import math

import torch
from torch import nn


def make(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(3, 5), (70, 30), (), (0,), (130, 40), (7,)]
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    parameters.append(nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)))
    return nn.ParameterList(parameters)


def train(models, averages, step):
    """The same step of several models, and an update of each average."""
    for model in models:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for p in model:
                p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=0.1)
                if step == 5 and p.shape == (7,):
                    p[2] = math.nan
                if step == 6 and p.shape == (7,):
                    p[2] = 0.5
    for one in averages:
        one.update()


def differences(ours, theirs, path=""):
    """Where two states differ in a bit; NaN equals NaN, and 0 is not −0."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), path
        return [d for key in ours for d in differences(ours[key], theirs[key], f"{path}.{key}")]
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), path
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(ours.element_size())
        one, other = ours.cpu().contiguous(), theirs.cpu().contiguous()
        if bits is None or not one.is_floating_point():
            same = one == other
        else:
            same = (one.view(bits) == other.view(bits)) | (one.isnan() & other.isnan())
        return [] if bool(same.all()) else [f"{path}: {int((~same).sum())} of {same.numel()}"]
    return [] if ours == theirs else [path]
