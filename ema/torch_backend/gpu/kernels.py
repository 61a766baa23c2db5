"""Process many tensors on a GPU in one pass over their memory, where PyTorch needs several.

PyTorch converts dtypes first or needs one pass for each operation, and its grouped operators slow
down with the number of tensors. An update moves this many bytes for each parameter:

======================  =============  ==============
average                 bf16, fp16     float32 params
======================  =============  ==============
float32                 10             12
float32, compensated    18             20
bfloat16                6              8
======================  =============  ==============

The check for NaN and Inf reads each parameter once. An exchange moves 16 bytes for two float32. The
results have the same bits as on the CPU. ``docs/benchmarks.md`` has measurements on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ema.errors import warn
from ema.rounding import Stream
from ema.torch_backend.calls import uninterrupted
from ema.torch_backend.gpu.grid import LOOK, WARPS, Launch, launches

__all__ = ["Exchange", "Fused", "Look", "available", "compiled", "supports"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_failed: set[torch.device] = set()
"""Devices for which a kernel could not be compiled."""


def supports(average: torch.dtype, params: torch.dtype) -> bool:
    """Whether there is a kernel for an average and params of these dtypes."""
    return average in (torch.float32, torch.bfloat16) and params in _FLOATS


def available(device: torch.device) -> bool:
    """Whether kernels can run on this device, as far as is known before one is compiled."""
    return device not in _failed and _suits(device)


@functools.cache
def _suits(device: torch.device) -> bool:
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def compiled(device: torch.device, *kernels: Fused | Look | Exchange) -> bool:
    """Compile these kernels now, not in the first update.

    Returns:
        Whether all kernels could be compiled. If not, :func:`available` returns False for this
        device from now on.

    Warns:
        EMAWarning: a kernel could not be compiled; the message has the reason.
    """
    try:
        for kernel in kernels:
            kernel.compile()
    except Exception as error:  # a compiler and its tools raise any exception
        _failed.add(device)
        warn(
            f"Triton cannot compile for {device}, so PyTorch's operators compute the averages, in"
            f" more passes and with the same bits: {type(error).__name__}: {error}"
        )
        return False
    return True


class Fused:
    """One update of averages on one device, prepared once and run at every step.

    The tensors are flat and contiguous. Their addresses are kept, so replace the ``Fused`` if you
    replace the memory of a tensor. A call allocates nothing. Ctrl-C cannot interrupt an update
    halfway.

    Args:
        averages: float32 or bfloat16, all of the same dtype.
        params: tensors of the same sizes, each in float32, bfloat16 or float16.
        remainders: the float32 remainders of compensated averages; None if the averages are not
            compensated.
        streams: the streams of random bits for bfloat16 averages, see :mod:`ema.rounding`; None to
            round to nearest.
        offsets: the position of each tensor's first element in the whole tensor, which numbers the
            random bits; None means 0.
        guarded: whether calls pass ``finite``; :func:`compiled` needs to know.

    Attributes:
        device: the device of the tensors.
        tensors: all tensors whose memory a call uses. The owner passes them to
            :meth:`ema.torch_backend.gpu.side_stream.SideStream.hold`.

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
        *,
        guarded: bool = False,
    ) -> None:
        self._compensated = remainders is not None
        self._stochastic = streams is not None
        self._guarded = guarded
        self._average = averages[0].dtype if averages else torch.float32
        self.device = averages[0].device if averages else torch.device("cpu")
        rows: dict[torch.dtype, list[tuple[int, ...]]] = {}
        for index, (average, live) in enumerate(zip(averages, params, strict=True)):
            remainder = average if remainders is None else remainders[index]
            if not supports(average.dtype, live.dtype) or average.dtype != self._average:
                raise TypeError(f"no kernel for {live.dtype} params and {average.dtype} averages")
            addresses = _addresses(average, live, remainder)
            low, high = (0, 0) if streams is None else streams[index]
            place = 0 if offsets is None else offsets[index] % (1 << 32)
            row = (*addresses, average.numel(), low, high, place)
            rows.setdefault(live.dtype, []).append(row)
        size = self._average.itemsize
        remainder_size = 4 if self._compensated else size
        self._launches = [
            (dtype, launch)
            for dtype, several in rows.items()
            for launch in launches(
                several, (size, dtype.itemsize, remainder_size), self.device, places=True
            )
        ]
        self.tensors = [*averages, *params, *(remainders or ()), *_memory(self._launches)]

    def __call__(self, weight: float, count: int = 0, finite: Tensor | None = None) -> None:
        """Run the update on the current stream.

        A weight of 0 changes nothing. A weight of 1 copies the params, rounded to nearest, and sets
        the remainders to zero. In a CUDA graph ``weight`` and ``count`` keep their values from the
        capture.

        Args:
            weight: ``1 − decay`` in [0, 1], as float64; it is rounded once, to float32.
            count: the number of the update; the random bits depend on it.
            finite: a bool on the device; if it is false, nothing is written.
        """
        weight = float(np.float32(weight))
        if weight == 0.0:
            return
        count = (count + (1 << 31)) % (1 << 32) - (1 << 31)  # the compiler always sees an int32
        _launch(self.device, self._calls(weight, count, finite))

    def compile(self) -> None:
        """Compile what a call launches."""
        finite = torch.ones((), dtype=torch.bool, device=self.device) if self._guarded else None
        _compile(self.device, self._calls(0.5, 1, finite))

    def _calls(self, weight: float, count: int, finite: Tensor | None) -> Iterator[_Call]:
        for dtype, launch in self._launches:
            yield _Call(
                "update",
                launch,
                (weight, count, finite),
                {
                    "AVERAGE": _name(self._average),
                    "PARAMS": _name(dtype),
                    "COMPENSATED": self._compensated,
                    "STOCHASTIC": self._stochastic,
                    "GUARDED": finite is not None,
                },
            )


class Look:
    """Checks whether tensors on one device are free of NaN and Inf, and reads each tensor once.

    Args:
        tensors: flat and contiguous, in float64, float32, bfloat16 or float16.

    Attributes:
        device: the device of the tensors.
        tensors: all tensors whose memory a call uses.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.device = tensors[0].device
        rows: dict[torch.dtype, list[tuple[int, ...]]] = {}
        for tensor in tensors:
            row = (*_addresses(tensor), tensor.numel())
            rows.setdefault(tensor.dtype, []).append(row)
        self._launches = [
            (dtype, launch)
            for dtype, several in rows.items()
            for launch in launches(several, (dtype.itemsize,), self.device, block=LOOK)
        ]
        self.tensors = [*tensors, *_memory(self._launches)]

    def __call__(self) -> Tensor:
        """Run the check on the current stream; return a bool on the device, without dimensions."""
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        _launch(self.device, self._calls(finite))
        return finite

    def compile(self) -> None:
        """Compile what a call launches."""
        _compile(self.device, self._calls(torch.ones((), dtype=torch.bool, device=self.device)))

    def _calls(self, finite: Tensor) -> Iterator[_Call]:
        for dtype, launch in self._launches:
            yield _Call("look", launch, (finite,), {"PARAMS": _name(dtype)})


class Exchange:
    """Exchanges the values of tensors on one device, in one launch for each size of element.

    Args:
        ones: dense tensors of any dtypes.
        others: tensors of the same shapes, strides and dtypes.

    Attributes:
        device: the device of the tensors.
        tensors: all tensors whose memory a launch uses.
    """

    def __init__(self, ones: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self.device = ones[0].device
        self._ones, self._others = ones, others
        self._at = self._addresses()
        if list(map(_form, ones)) != list(map(_form, others)):
            raise ValueError(
                "tensors can only change places with tensors of the same shape and dtype"
            )
        sizes = np.array([min(8, one.element_size()) for one in ones])
        table = np.array([*self._at, [one.nbytes for one in ones]], dtype=np.int64).T
        table[:, 2] //= sizes  # a complex128 is two elements of 8 bytes
        self._launches = [
            (size, launch)
            for size in map(int, np.unique(sizes))
            for launch in launches(table[sizes == size], (size, size), self.device)
        ]
        self.tensors = [*ones, *others, *_memory(self._launches)]

    def where_memory_is(self) -> Exchange:
        """This exchange, or a new one of the same tensors if their memory has moved."""
        if self._addresses() == self._at:
            return self
        return Exchange(self._ones, self._others)

    def launches(self) -> list[Callable[[], None]]:
        """Calls that each exchange a part on the current stream, completely or not at all."""
        return [partial(_launch, self.device, [call]) for call in self._calls()]

    def compile(self) -> None:
        """Compile what :meth:`launches` launches."""
        _compile(self.device, self._calls())

    def _calls(self) -> Iterator[_Call]:
        import triton.language as tl

        elements = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
        for size, launch in self._launches:
            yield _Call("exchange", launch, (), {"ELEMENT": elements[size]})

    def _addresses(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self._ones)), list(map(Tensor.data_ptr, self._others))


class _Call(NamedTuple):
    """One launch of a kernel.

    Attributes:
        name: the name of the kernel in :mod:`ema.torch_backend.gpu.device_code`.
        launch: the blocks of the launch.
        arguments: the arguments after the blocks.
        constants: the constants that the kernel is compiled for.
    """

    name: str
    launch: Launch
    arguments: tuple[object, ...]
    constants: dict[str, object]

    @property
    def keywords(self) -> dict[str, object]:
        """Constants of the kernel and options of the compiler."""
        whole = {"WHOLE": self.launch.whole, "BLOCK": self.launch.block}
        # the kernels fuse multiply-adds explicitly
        return {**self.constants, **whole, "num_warps": WARPS, "enable_fp_fusion": False}


def _launch(device: torch.device, calls: Iterable[_Call]) -> None:
    with _current(device), uninterrupted():
        for call in calls:
            kernel = _kernel(call.name)[call.launch.grid]
            kernel(call.launch.table, call.launch.blocks, *call.arguments, **call.keywords)


def _compile(device: torch.device, calls: Iterable[_Call]) -> None:
    """Compile and load kernels; on the CPU, Triton's interpreter needs neither."""
    if device.type != "cuda":
        return
    with _current(device):
        for call in calls:
            arguments = (call.launch.table, call.launch.blocks, *call.arguments)
            found = _kernel(call.name).warmup(*arguments, grid=call.launch.grid, **call.keywords)
            found[call.launch.grid]  # loads the kernel, which must not happen in a CUDA graph


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _kernel(name: str) -> Any:
    from ema.torch_backend.gpu import device_code

    return getattr(device_code, name)


def _name(dtype: torch.dtype) -> Any:
    """Triton's dtype for a dtype of PyTorch."""
    import triton.language as tl

    return {
        torch.float64: tl.float64,
        torch.float32: tl.float32,
        torch.bfloat16: tl.uint16,  # the bits of bfloat16
        torch.float16: tl.float16,
    }[dtype]


def _form(tensor: Tensor) -> tuple[torch.dtype, torch.Size]:
    return tensor.dtype, tensor.shape


def _addresses(first: Tensor, *others: Tensor) -> tuple[int, ...]:
    for tensor in (first, *others):
        if tensor.shape != (first.numel(),) or not tensor.is_contiguous():
            raise ValueError(
                f"a kernel needs flat contiguous tensors of the same length, got {tensor.shape}"
            )
    return tuple(tensor.data_ptr() for tensor in (first, *others))


def _memory(several: Iterable[tuple[object, Launch]]) -> list[Tensor]:
    return [tensor for _, launch in several for tensor in (launch.table, launch.blocks)]
