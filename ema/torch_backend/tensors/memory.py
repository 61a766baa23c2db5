"""Tensors as stretches of memory: flat views, dense layouts, allocation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = [
    "CHUNK",
    "NARROW_CHUNK",
    "PLAIN",
    "SERIAL",
    "SMALL",
    "allocate",
    "flat",
    "in_form_of",
    "is_dense",
    "real",
    "row_major",
]

CHUNK = 1 << 20
"""Elements that pass through a buffer at a time: 4 MiB of float32, which stay in cache."""

NARROW_CHUNK = 1 << 19
"""The same where an update takes twenty operations in five buffers: 10 MiB of them."""

SMALL = 1 << 12
"""Tensors of up to this many elements share an allocation and are averaged side by side."""

PLAIN = frozenset({Tensor, nn.Parameter, nn.Buffer})
"""Types of tensors whose memory is their whole value."""

SERIAL = 1 << 15
"""Elements that PyTorch handles on one CPU thread (``at::internal::GRAIN_SIZE``)."""


def real(tensor: Tensor) -> Tensor:
    """``tensor``, or the pairs of reals that a complex one consists of: a view, detached."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory once, in whatever order of dimensions."""
    if tensor.is_contiguous():  # the rule below in one call
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def flat(tensor: Tensor) -> Tensor:
    """The memory of a dense tensor as a real, one-dimensional view."""
    tensor = real(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def row_major(tensor: Tensor) -> Tensor:
    """The elements of any strided tensor in row-major order, as a real vector of stride 1.

    It is a view where they lie in that order already. ``contiguous()`` alone does not give this:
    PyTorch calls every tensor with at most one element contiguous, with any strides.
    """
    return flat(tensor.contiguous())


def in_form_of(ours: Tensor, theirs: Tensor, value: Tensor) -> Tensor:
    """The values of one of two dense tensors in one memory, as the other one shows them.

    Args:
        ours: the tensor with the shape and strides that are wanted, for instance ``weight.t()``.
        theirs: the tensor of the shape of ``value``, for instance ``weight``.
        value: values for ``theirs``, with any strides.

    Returns:
        ``value`` itself where the two have the same shape and strides, or else a copy.
    """
    if ours.shape == theirs.shape and ours.stride() == theirs.stride():
        return value
    memory = value.new_empty(value.numel())
    memory.as_strided(theirs.shape, theirs.stride()).copy_(value)
    return memory.as_strided(ours.shape, ours.stride())


def allocate(
    tensors: Mapping[str, Tensor], kinds: Mapping[str, tuple[torch.device, torch.dtype]]
) -> dict[str, Tensor]:
    """An uninitialized tensor for each of ``tensors``, on the device and of the dtype of its kind.

    It has the shape, and where the original is dense the strides. Small ones of one kind lie side
    by side in one allocation, in the order given.
    """
    pooled: dict[tuple[torch.device, torch.dtype], int] = {}
    for name, tensor in tensors.items():
        if tensor.numel() <= SMALL:
            pooled[kinds[name]] = pooled.get(kinds[name], 0) + tensor.numel()
    # averages outlive the caller's mode, and an inference tensor could never be written again
    with torch.inference_mode(mode=False):
        pools = {
            (device, dtype): torch.empty(size, dtype=dtype, device=device)
            for (device, dtype), size in pooled.items()
        }
        fresh = {}
        for name, tensor in tensors.items():
            device, dtype = kinds[name]
            if tensor.numel() <= SMALL:
                pool = pools[device, dtype]
                memory, pools[device, dtype] = pool.tensor_split([tensor.numel()])
            else:
                memory = torch.empty(tensor.numel(), dtype=dtype, device=device)
            fresh[name] = (
                memory.as_strided(tensor.shape, tensor.stride())
                if is_dense(tensor)
                else memory.view(tensor.shape)
            )
    return fresh
