"""Looking for NaN and Inf where a wait for the device, or a flag of another one, would cost or lie."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ema
from ema import EMAModel
from ema.errors import EMAWarning, StateError
from ema.torch_backend.gpu import kernels
from ema.torch_backend.update import guard
from tests.torch_backend.gpu.runs import differences, make, train
from tests.torch_backend.gpu.simulation import GPU, OTHER


class Waits(TorchDispatchMode):
    """Counts what the host asks a device for: numbers, and copies that it waits for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("how", "waits"),
    [
        ({}, 0),
        ({"compensated": True}, 0),
        ({"dtype": torch.bfloat16}, 0),
        ({"on_nonfinite": "skip"}, 0),
        ({"on_nonfinite": "raise"}, 1),
    ],
    ids=str,
)
def test_how_often_an_update_waits_for_the_device(how, waits, monkeypatch):
    """Seven tensors, on a CPU that passes for a GPU."""
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(guard.DeviceFlag, "has_arrived", lambda self: False)
    model = make()
    one = EMAModel(model, 0.9, **how)
    one.update()
    with Waits() as counted:
        one.update()
    assert counted.count == waits


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("arrived", [True, False])
@pytest.mark.parametrize("decay", [0.9, ema.DebiasedDecay(decay=0.9)])
def test_skipped_updates_are_counted_however_late_the_device_tells(decay, arrived, monkeypatch):
    """A decay that depends on the count waits for it; a constant one goes on."""
    first, second = make(), make()
    plain = EMAModel(first, decay, on_nonfinite="skip")
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(guard.DeviceFlag, "has_arrived", lambda self: arrived)
    late = EMAModel(second, decay, on_nonfinite="skip")
    for step in range(1, 9):
        train((first, second), (plain, late), step)
    assert len(late._counters.pending) == (8 if decay == 0.9 and not arrived else 1)
    assert (late.step, late.count, late.skipped) == (8, 7, 1)
    assert differences(plain.state_dict(), late.state_dict()) == []
    assert late._counters.pending == ()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kernel", [True, False])
def test_names_are_looked_for_once_something_is_not_finite(kernel, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda device: kernel)
    model = make()
    one = EMAModel(model, 0.9, on_nonfinite="raise")
    one.update()
    with torch.no_grad():
        model[4][77, 3] = math.inf
        model[6][1, 2, 3, 1] = math.nan
    with pytest.raises(StateError, match=r"got `4`, `6`$"):
        one.update()
    assert (one.step, one.count) == (1, 1)


def test_memory_that_moves_is_looked_at_where_it_is_by_then(monkeypatch, interpreted):
    """Small vectors that no kernel averages are read through the module's own tensor."""
    monkeypatch.setattr(kernels, "available", lambda device: True)
    model = nn.ParameterList([nn.Parameter(torch.zeros(8, dtype=torch.float64))])
    model.append(nn.Parameter(torch.zeros(9)))
    one = EMAModel(model, 0.9, on_nonfinite="raise")
    one.update()
    for index, size in ((0, 8), (1, 9)):
        before, model[index].data = model[index].data, torch.ones(size).to(model[index])
        before.fill_(math.nan)
    one.update()
    model[0].data = torch.full((8,), math.nan, dtype=torch.float64)
    with pytest.raises(StateError, match="`0`"):
        one.update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_all_finite_finds_one_bad_element(dtype, bad, monkeypatch):
    """In groups of which each needs little memory for itself."""
    monkeypatch.setattr(guard, "_PIECE", 100)
    monkeypatch.setattr(guard, "_SCRATCH", 50)
    tensors = [torch.randn(n).to(dtype) for n in (1, 3, 2047, 5000, 64, 7)]
    tensors[3][:] = torch.finfo(dtype).max
    groups = list(guard._of_bounded_scratch(sorted(tensors, key=torch.Tensor.numel)))
    assert [len(group) for group in groups] == [4, 1, 1]
    assert guard.all_finite(tensors)
    tensors[3][1234] = bad
    assert not guard.all_finite(tensors)


class NoFloat64(TorchDispatchMode):
    """As on MPS, which has none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (list, tuple)) else [result]
        assert all(not isinstance(t, torch.Tensor) or t.dtype != torch.float64 for t in made)
        return result


def test_a_look_on_an_accelerator_needs_no_float64():
    tensors = [torch.randn(n).to(d) for n in (3, 500) for d in (torch.float32, torch.bfloat16)]
    with NoFloat64():
        assert guard.all_finite(tensors)
        guard.on_every_device({tensor.device: guard.all_finite([tensor]) for tensor in tensors})


def test_the_scratch_of_a_look_does_not_grow_with_tensors_times_the_largest_one():
    tensors = [torch.empty(size, device="meta") for size in [1 << 30, *[5] * 10_000, 1 << 31]]
    groups = list(guard._of_bounded_scratch(sorted(tensors, key=torch.Tensor.numel)))
    assert [len(group) for group in groups] == [10_000, 2]


class Bool:
    """A flag on a simulated device, combined and copied as PyTorch orders it."""

    def __init__(self, gpu, device, value=None):
        self.gpu, self.device, self.value = gpu, device, value

    def made(self, by):
        """Its value once the current stream of its device has come so far."""
        self.gpu.launch(lambda: setattr(self, "value", by()), self.device)
        return self

    def __and__(self, other):
        assert other.device == self.device
        return Bool(self.gpu, self.device).made(lambda: self.value and other.value)

    def to(self, device, *, non_blocking):
        assert non_blocking
        if device == self.device:
            return self
        there, here = self.gpu.current[device], self.gpu.current[self.device]
        here.wait_stream(there)
        copy = Bool(self.gpu, device)
        here.queue.append(lambda: setattr(copy, "value", self.value))
        there.wait_stream(here)
        return copy


@pytest.mark.parametrize("bad", [None, GPU, OTHER])
def test_every_device_reads_a_flag_of_its_own_after_all_were_looked_at(gpu, latest_first, bad):
    found = {}
    flags = {d: Bool(gpu, d).made(lambda d=d: d != bad) for d in (GPU, OTHER)}
    joined = guard.on_every_device(flags)
    for device, flag in joined.items():
        assert flag.device == device
        gpu.launch(lambda d=device, f=flag: found.update({d: f.value}), device)
    gpu.drain(latest_first=latest_first)
    assert found == dict.fromkeys((GPU, OTHER), bad is None)


def fail(_):
    raise RuntimeError("there is no C compiler")


@pytest.fixture
def without_compiler(monkeypatch):
    monkeypatch.setattr(kernels, "_failed", set())
    monkeypatch.setattr(kernels, "_suits", lambda device: True)
    for kernel in (kernels.Fused, kernels.Look, kernels.Exchange):
        monkeypatch.setattr(kernel, "compile", fail)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("options", [{}, {"on_nonfinite": "skip"}, {"dtype": torch.bfloat16}])
def test_without_a_compiler_pytorch_averages_and_one_warning_says_so(options):
    first, second = make(), make()
    with pytest.warns(EMAWarning, match="cannot compile for cpu.*no C compiler") as warned:
        one = EMAModel(first, 0.9, **options)
    assert len(warned) == 1
    assert (one.step, one.count) == (0, 0)
    other = EMAModel(second, 0.9, **options)  # says nothing more
    for step in range(1, 9):
        train((first, second), (one, other), step)
    assert differences(one.state_dict(), other.state_dict()) == []
    assert one._averages._bound.update._sweep._kernels == [[]]


def test_kernels_are_compiled_before_the_first_update(monkeypatch, interpreted):
    """All that it launches, and nothing else."""
    monkeypatch.setattr(kernels, "available", lambda device: True)
    made = []
    monkeypatch.setattr(
        kernels,
        "_compile",
        lambda device, calls: made.extend(_kind(call) for call in calls),
    )
    model = make()
    model.append(nn.Parameter(torch.randn(5).bfloat16()))
    one = EMAModel(model, 0.9, on_nonfinite="skip")
    launched = []
    real = kernels._launch
    monkeypatch.setattr(
        kernels,
        "_launch",
        lambda device, calls: real(device, (launched.append(_kind(c)) or c for c in calls)),
    )
    one.update()
    assert set(launched) == set(made)


def _kind(call):
    return call.name, call.launch.whole, *map(str, call.constants.items())
