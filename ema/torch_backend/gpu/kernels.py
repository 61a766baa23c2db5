"""One update of many tensors on a GPU in one pass over their memory, where PyTorch takes several.

PyTorch's grouped operators reach that for a float32 average of float32 params. Elsewhere they
convert first, or need a pass for each operation; Triton does not. Bytes moved for each parameter:

======================  =============  =================
average                 bf16, fp16     float32 params
======================  =============  =================
float32                 10             12 (as a guarded update; otherwise ``torch._foreach_lerp_``)
float32, compensated    18             20
bfloat16                6              8
======================  =============  =================

The bits are those of the CPU. This was run in Triton's interpreter and compiled for a GPU, and has
not been measured on one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, _foreach_norm

from ema.rounding import Stream
from ema.torch_backend.interrupts import uninterrupted

__all__ = ["Fused", "all_finite", "available", "supports"]

_BLOCK = 2048
"""Elements that one program of the grid updates, with :data:`_WARPS` warps."""
_WARPS = 8
_ALIGNED = 16
"""Bytes of one load of a thread: what begins at a multiple of it is read in such pieces."""


def supports(average: torch.dtype, params: torch.dtype) -> bool:
    """Whether there is a kernel for params of this dtype and an average of that one."""
    return average in (torch.float32, torch.bfloat16) and params in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    )


@functools.cache
def available(device: torch.device) -> bool:
    """Whether kernels run on this device. The first question on a GPU compiles a small one."""
    if device.type != "cuda":
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:  # Triton may lack, and it needs a C compiler on the machine
        one = torch.ones(1, device=device)
        Fused([torch.zeros_like(one)], [one])(0.5)
    except Exception:  # whatever it is, PyTorch's operators work
        return False
    return True


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether no element is NaN or infinite: a bool on the device of the first, without a sync.

    Args:
        tensors: at least one, real and of floating point, of any dtypes and devices.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    result = torch.ones((), dtype=torch.bool, device=tensors[0].device)
    for group in alike.values():
        largest = torch.stack(_foreach_norm(group, math.inf))
        result.logical_and_(largest.isfinite().all().to(result.device, non_blocking=True))
    return result


class _Launch(NamedTuple):
    """Blocks of tensors of the same dtypes; ``whole`` ones need no mask and begin aligned."""

    table: Tensor
    blocks: Tensor
    params: torch.dtype
    whole: bool


class Fused:
    """One update of averages on one device, prepared once and run at every step.

    The tensors are flat and contiguous; their addresses are kept, so whoever replaces the memory
    of one makes another ``Fused``. Nothing is allocated in a call. Ctrl-C finds an update that is
    done or not begun.

    Args:
        averages: of float32 or bfloat16, all of one dtype.
        params: of the same sizes, each in float32, bfloat16 or float16.
        remainders: of the averages if they are compensated, float32; None: they are not.
        streams: of the random bits of bfloat16 averages, see :mod:`ema.rounding`; None: they are
            rounded to nearest.
        offsets: the place of each tensor's first element in the whole tensor that the random bits
            count through; None: 0.

    Attributes:
        tensors: whose memory a call uses, for :meth:`ema.torch_backend.gpu.lane.Lane.hold`.

    Raises:
        ValueError: the sequences do not match.
        TypeError: there is no kernel for these dtypes.
    """

    def __init__(
        self,
        averages: Sequence[Tensor],
        params: Sequence[Tensor],
        remainders: Sequence[Tensor] | None = None,
        streams: Sequence[Stream] | None = None,
        offsets: Sequence[int] | None = None,
    ) -> None:
        self._compensated = remainders is not None
        self._stochastic = streams is not None
        rows: dict[torch.dtype, list[tuple[int, ...]]] = {}
        for index, (average, live) in enumerate(zip(averages, params, strict=True)):
            remainder = average if remainders is None else remainders[index]
            if not supports(average.dtype, live.dtype) or average.dtype != averages[0].dtype:
                raise TypeError(f"no kernel for {live.dtype} params and {average.dtype} averages")
            for tensor in (average, live, remainder):
                if tensor.shape != (average.numel(),) or not tensor.is_contiguous():
                    raise ValueError(f"a kernel needs flat tensors alike, got {tensor.shape}")
            low, high = (0, 0) if streams is None else streams[index]
            offset = 0 if offsets is None else offsets[index] % (1 << 32)
            addresses = (average.data_ptr(), live.data_ptr(), remainder.data_ptr())
            row = (*addresses, average.numel(), low, high, offset)
            rows.setdefault(live.dtype, []).append(row)
        self._average = averages[0].dtype if averages else torch.float32
        self._device = averages[0].device if averages else torch.device("cpu")
        self._launches = [
            launch for dtype, table in rows.items() for launch in self._prepare(dtype, table)
        ]
        self.tensors = [*averages, *params, *(remainders or ())]
        self.tensors += [tensor for launch in self._launches for tensor in launch[:2]]

    def _prepare(self, params: torch.dtype, rows: list[tuple[int, ...]]) -> Iterator[_Launch]:
        table = torch.tensor(rows, dtype=torch.int64)
        aligned = (table[:, :3] % _ALIGNED == 0).all(dim=1)
        whole = torch.where(aligned, table[:, 3] // _BLOCK, 0)
        rest = -(-table[:, 3] // _BLOCK) - whole
        on_device = table.to(self._device)
        for first, number, is_whole in (
            (torch.zeros_like(whole), whole, True),
            (whole, rest, False),
        ):
            total = int(number.sum())
            if total == 0:
                continue
            tensors = torch.repeat_interleave(torch.arange(len(rows)), number)
            begins = number.cumsum(0) - number - first
            blocks = torch.stack([tensors, torch.arange(total) - begins[tensors]], dim=1)
            yield _Launch(on_device, blocks.to(self._device, torch.int32), params, is_whole)

    def __call__(
        self, weight: float | Tensor, count: int | Tensor = 0, finite: Tensor | None = None
    ) -> None:
        """Run it on the current stream.

        A weight of 0 leaves everything, one of 1 copies the params, rounded to nearest, and makes
        the remainders zero. In a CUDA graph numbers stay what they were at capture: there,
        ``weight`` and ``count`` are tensors on the device, and one call before has compiled.

        Args:
            weight: ``1 − decay`` in [0, 1] and float64; rounded once, to float32.
            count: the number of the update, which the random bits depend on; a tensor where
                ``weight`` is one, both of one element.
            finite: a bool on the device; where it is false nothing is written.
        """
        on_device = isinstance(weight, Tensor)
        if isinstance(weight, Tensor):
            count = torch.as_tensor(count, device=self._device)
        else:
            if isinstance(count, Tensor):
                raise TypeError("`count` may be a tensor where `weight` is one")
            weight = float(np.float32(weight))
            count = (count + (1 << 31)) % (1 << 32) - (1 << 31)  # always an int32 to the compiler
            if weight == 0.0:
                return
        if not self._launches:
            return
        import triton.language as tl

        from ema.torch_backend.gpu import device_code

        names: dict[torch.dtype, Any] = {
            torch.float32: tl.float32,
            torch.bfloat16: tl.uint16,  # its bits
            torch.float16: tl.float16,
        }
        on_gpu = self._device.type == "cuda"
        with torch.cuda.device(self._device) if on_gpu else nullcontext(), uninterrupted():
            for launch in self._launches:
                device_code.update[(len(launch.blocks),)](
                    launch.table,
                    launch.blocks,
                    weight,
                    count,
                    finite,
                    AVERAGE=names[self._average],
                    PARAMS=names[launch.params],
                    COMPENSATED=self._compensated,
                    STOCHASTIC=self._stochastic,
                    GUARDED=finite is not None,
                    ON_DEVICE=on_device,
                    WHOLE=launch.whole,
                    BLOCK=_BLOCK,
                    num_warps=_WARPS,
                    enable_fp_fusion=False,  # what is fused says so
                )
