"""Copy tensors that are not averaged, of any class.

A quantized weight is either a wrapper around several tensors (torchao), which are copied one by
one, or it keeps its scales where only its own class finds them (bitsandbytes). The bytes of the
second kind mean nothing without these scales, so they are never copied alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ema.torch_backend.tensors.memory import PLAIN
from ema.torch_backend.tensors.sharding import is_sharded, local_of

__all__ = ["copy_over", "has_memory", "host_copy", "kind_of", "obstacle", "without_values"]


def without_values(tensor: Tensor) -> str:
    """Where a tensor is that holds no values, in words; empty if it holds some."""
    if is_lazy(tensor):
        return "in a lazy module, which has no values before its first forward pass"
    return "on the meta device, which holds no values" if tensor.is_meta else ""


def has_memory(tensor: Tensor) -> bool:
    """Whether its elements lie in memory of its own; those of a wrapper lie in other tensors."""
    tensor = _local(tensor)
    if _parts(tensor):
        return False
    try:
        return not tensor.numel() or bool(tensor.data_ptr())
    except RuntimeError:  # a wrapper may have no address
        return False


def kind_of(tensor: Tensor) -> str:
    """Its class with an article."""
    name = type(tensor).__name__
    return f"{'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def obstacle(theirs: Tensor, ours: Tensor) -> str:
    """The reason why :func:`copy_over` cannot write ``ours`` into ``theirs``; empty if it can.

    Args:
        theirs: of the same shape and, where it is sharded, the same place.
        ours: not averaged.
    """
    if theirs is ours:
        return ""
    if reason := without_values(theirs):
        return f"is {reason}"
    if reason := without_values(ours):
        return f"is here {reason}"
    return _unlike(_local(theirs), _local(ours))


def copy_over(theirs: Tensor, ours: Tensor) -> None:
    """Write ``ours`` into ``theirs``, for which :func:`obstacle` has found no obstacle."""
    theirs, ours = _local(theirs), _local(ours)
    if parts := _parts(ours):
        for part in parts:
            copy_over(getattr(theirs, part), getattr(ours, part))
    elif _is_written(theirs, ours):
        theirs.detach().copy_(ours.detach())


def host_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU in this dtype; a wrapper stays one."""
    tensor = tensor.detach()
    if has_memory(tensor):
        return tensor.to("cpu", dtype, copy=True)
    # not every wrapper knows `copy`
    return tensor.clone() if tensor.device.type == "cpu" else tensor.to("cpu")


def _parts(tensor: Tensor) -> list[str]:
    """The attributes that hold the tensors of a wrapper; none for anything else."""
    wrapper: Any = tensor
    if is_sharded(tensor) or not hasattr(tensor, "__tensor_flatten__"):
        return []
    return list(wrapper.__tensor_flatten__()[0])


def _unlike(theirs: Tensor, ours: Tensor) -> str:
    if _parts(theirs) or _parts(ours):
        same = _same_parts(theirs, ours)
        return (
            "" if same else f"is {kind_of(theirs)}, here it is {kind_of(ours)}, quantized otherwise"
        )
    if _is_written(theirs, ours) and _is_quantized_otherwise(theirs.dtype, ours.dtype):
        return f"is {theirs.dtype}, here it is {ours.dtype}, quantized otherwise"
    if _is_written(theirs, ours) or _equal(theirs, ours):
        return ""
    if _is_plain(theirs):
        return "repeats its elements, and holds other values than here"
    return f"is {kind_of(theirs)} of other values than here, which mean nothing without its scales"


def _is_quantized_otherwise(theirs: torch.dtype, ours: torch.dtype) -> bool:
    """Whether a cast between the two loses fractions, a range or a scale, and not only digits."""
    if theirs == ours:
        return False
    return theirs.itemsize == 1 or ours.itemsize == 1 or _family(theirs) != _family(ours)


def _family(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "real" if dtype.is_floating_point else "integer"


def _same_parts(theirs: Any, ours: Any) -> bool:
    """Whether two wrappers are made alike, so that the tensors of one can take those of the other."""
    if type(theirs) is not type(ours):
        return False
    (parts, context), (others, other) = theirs.__tensor_flatten__(), ours.__tensor_flatten__()
    return bool(list(parts) == list(others) and context == other) and all(
        _same_part(getattr(theirs, part), getattr(ours, part)) for part in parts
    )


def _same_part(theirs: Tensor, ours: Tensor) -> bool:
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    return not obstacle(theirs, ours)


def _is_written(theirs: Tensor, ours: Tensor) -> bool:
    """Whether ``copy_`` copies the whole value. It does not for packed integers or repeated memory."""
    return (
        _is_plain(theirs)
        and _is_plain(ours)
        and not any(s == 0 and n > 1 for s, n in _dims(theirs))
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether its memory holds plain numbers. A subclass may pack several numbers into an integer."""
    return type(tensor) in PLAIN or (has_memory(tensor) and tensor.is_floating_point())


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
    if tensor.layout != torch.strided:
        return []
    return list(zip(tensor.stride(), tensor.shape, strict=True))


def _equal(theirs: Tensor, ours: Tensor) -> bool:
    if type(theirs) is not type(ours) or not has_memory(ours):
        return False
    here = ours.detach()
    return theirs.dtype == ours.dtype and torch.equal(theirs.detach().to(here.device), here)


def _local(tensor: Any) -> Tensor:
    """The part of a sharded tensor that is here, of its own class; a plain tensor is itself."""
    return local_of(tensor) if is_sharded(tensor) else tensor
