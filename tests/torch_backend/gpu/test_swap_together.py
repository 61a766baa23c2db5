"""Swaps of many tensors in few launches, as on an accelerator; the CPU passes for one.

The tests of an ordinary swap hold for them too, and are run again here.
"""

import ctypes
import signal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ema import EMAModel, StateError
from ema.torch_backend.gpu import kernels
from ema.torch_backend.gpu.grid import BLOCK
from ema.torch_backend.swap import exchanges
from ema.torch_backend.swap import swap as swap_module
from tests.torch_backend.gpu.runs import differences, make
from tests.torch_backend.test_swap import (  # noqa: F401 — run again
    assert_whole,
    assigned_or_not,
    snapshot,
    test_a_model_that_is_converted_in_the_block_gets_all_live_values,
    test_an_exception_in_the_block_restores_and_goes_on,
    test_another_model_that_is_converted_in_the_block_gets_its_values_back,
    test_another_model_with_the_same_names,
    test_apply_and_restore,
    test_apply_and_restore_around_a_conversion,
    test_averages_inside_the_block_and_live_weights_after_it,
    test_backward_through_weights_that_a_swap_has_touched_is_loud,
    test_ctrl_c_at_every_bytecode_of_a_swap_leaves_the_live_weights,
    test_nested_blocks_of_one_average_swap_once,
    test_real_ctrl_c_at_random_moments_leaves_the_live_weights,
    test_several_conversions_in_one_block_round_the_live_values_once,
    test_what_is_refused_while_averages_are_in,
    trained,
)

COPIES = {torch.ops.aten._foreach_copy_.default, torch.ops.aten.copy_.default}
SIZES = {"int8": 1, "int16": 2, "int32": 4, "int64": 8}


def exchange(device, calls):
    """What the kernel does, on the addresses of its table."""
    for call in calls:
        assert call.name == "exchange"
        size = SIZES[str(call.constants["ELEMENT"])]
        table = call.launch.table.tolist()
        for row, block in call.launch.blocks.tolist():
            one, other, number = table[row]
            start = block * call.launch.block
            count = (min(start + call.launch.block, number) - start) * size
            one, other = one + start * size, other + start * size
            kept = ctypes.string_at(one, count)
            ctypes.memmove(one, other, count)
            ctypes.memmove(other, kept, count)


@pytest.fixture(autouse=True, params=["kernel", "groups"])
def way(request, monkeypatch):
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    monkeypatch.setattr(swap_module, "many_at_once", lambda device: True)
    if request.param == "kernel":
        # the updates are those of the CPU
        monkeypatch.setattr(kernels, "supports", lambda average, params: False)
        monkeypatch.setattr(kernels, "available", lambda device: True)
        monkeypatch.setattr(kernels, "_launch", exchange)
    else:
        large = "real_ctrl_c" in request.node.name  # in so small groups it would take a minute
        monkeypatch.setattr(exchanges, "TOGETHER", 1 << 20 if large else 20)
    return request.param


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16, torch.complex64, torch.complex128])
@pytest.mark.parametrize("average", [None, torch.bfloat16, torch.float64])
def test_every_bit_goes_in_and_comes_back(live, average):
    """Vectors, matrices, scalars, empty ones, channels last, tied ones."""
    model = nn.ParameterList(make(torch.float32))
    for index, parameter in enumerate(model):
        model[index] = nn.Parameter(parameter.detach().to(live))
    model.append(model[1])
    model.append(nn.Parameter(torch.randn(1 << 13, dtype=live)[3:]))
    model.append(nn.Parameter(torch.randn(7, 5, dtype=live)[:, ::2]))
    one = EMAModel(model, 0.9, dtype=average, stochastic_rounding=False)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            parameter.add_(torch.randn(parameter.shape).to(parameter))
    one.update()
    before = snapshot(one)
    with one.use_ema():
        inside = {name: p.detach().clone() for name, p in model.named_parameters()}
        shown = {n: a.to(live) for n, a in before[1].items()}
        assert differences(inside, {name: shown[name] for name in inside}) == []
    assert_whole(one, before)


def test_few_launches_take_all(way, monkeypatch):
    """However many tensors there are."""
    model = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(300)])
    model.extend([nn.Parameter(torch.randn(4).bfloat16()) for _ in range(300)])
    one = EMAModel(model, 0.9)
    monkeypatch.setattr(exchanges, "TOGETHER", 1 << 26)
    operations = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in COPIES:
                operations.append(function)
            return function(*args, **(kwargs or {}))

    launched = []
    monkeypatch.setattr(kernels, "_launch", lambda *call: (launched.append(call), exchange(*call)))
    with Counting(), one.use_ema():
        pass
    if way == "kernel":
        assert len(launched) == 2  # one each way
        assert len(operations) == 3
    else:
        assert len(operations) == 9


def counting(monkeypatch):
    """How many exchanges are prepared from now on."""
    prepared = []
    make_one = kernels.Exchange.__init__
    monkeypatch.setattr(
        kernels.Exchange,
        "__init__",
        lambda self, *tensors: (prepared.append(self), make_one(self, *tensors))[1],
    )
    return prepared


def test_the_next_swap_of_the_same_tensors_spares_the_preparation(way, monkeypatch):
    if way != "kernel":
        pytest.skip("nothing is kept")
    model = make()
    one = EMAModel(model, 0.9)
    prepared = counting(monkeypatch)
    for step in range(4):
        with torch.no_grad():
            for parameter in model:
                parameter.add_(step)
        one.update()
        before = snapshot(one)
        with one.use_ema():
            inside = {name: p.detach().clone() for name, p in model.named_parameters()}
            assert differences(inside, before[1]) == []
        assert_whole(one, before)
    assert len(prepared) == 1
    assert not swap_module.any_swapped()


CHANGES = {
    "memory": lambda model: setattr(model[1], "data", model[1].data.clone()),
    "small float64": lambda model: setattr(model[-1], "data", model[-1].data.clone()),
    "parameter": lambda model: model.register_parameter("1", nn.Parameter(model[1].detach() + 1)),
    "storage": lambda model: model.share_memory(),
    "dtype": lambda model: setattr(model[1], "data", model[1].data.double()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_has_changed_is_prepared_anew(change, way, monkeypatch):
    """Also a vector that updates read wherever it is, so that nobody watches its memory."""
    if way != "kernel":
        pytest.skip("nothing is kept")
    model = make()
    model.append(nn.Parameter(torch.randn(5, dtype=torch.float64)))
    one = EMAModel(model, 0.9)
    with torch.no_grad():
        for parameter in model:
            parameter.add_(1.0)
    one.update()
    with one.use_ema():
        pass
    prepared = counting(monkeypatch)
    change(model)
    before = snapshot(one)
    with one.use_ema():
        inside = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert differences(inside, {n: a.to(inside[n]) for n, a in before[1].items()}) == []
    assert_whole(one, before)
    assert prepared


def test_a_storage_that_has_moved_is_prepared_anew(way):
    """Of a vector whose memory nobody watches: it is still the same storage, elsewhere."""
    model = nn.ParameterList([nn.Parameter(torch.randn(5, dtype=torch.float64))])
    one = EMAModel(model, 0.9)
    with torch.no_grad():
        model[0].add_(1.0)
    one.update()
    with one.use_ema():
        pass
    before = snapshot(one)
    model.share_memory()
    with one.use_ema():
        assert differences({"0": model[0].detach().clone()}, before[1]) == []
    assert_whole(one, before)


def test_a_late_exit_does_not_end_a_swap_that_spared_the_preparation(way):
    """A block that another one's exit has ended, while the averages are in again."""
    model = make()
    one = EMAModel(model, 0.9)
    with torch.no_grad():
        model[1].add_(1.0)
    one.update()
    before = snapshot(one)
    first, second = one.use_ema(), one.use_ema()
    first.__enter__()
    second.__enter__()
    with pytest.raises(StateError):
        first.__exit__(None, None, None)
    one.apply_ema()
    second.__exit__(None, None, None)
    inside = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert differences(inside, before[1]) == []
    one.restore_original()
    assert_whole(one, before)


class Failing(TorchDispatchMode):
    """One grouped copy raises, before it or after it was made."""

    def __init__(self, at, *, late):
        super().__init__()
        self.left, self.late = at, late

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        copies = function in COPIES
        self.left -= copies
        if copies and self.left == 0 and not self.late:
            raise MemoryError
        result = function(*args, **(kwargs or {}))
        if copies and self.left == 0:
            raise MemoryError
        return result


@pytest.mark.parametrize("late", [False, True])
def test_a_failing_launch_anywhere_leaves_the_live_weights(trained, late, way, monkeypatch):  # noqa: F811
    """A launch of a kernel that raises was not made; a copy may have been."""
    _, ema_model = trained
    before = snapshot(ema_model)
    left = 0

    def fail(device, calls):
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("CUDA error: out of memory")
        exchange(device, calls)

    monkeypatch.setattr(kernels, "_launch", fail)
    failed = 0
    for at in range(1, 100):
        left = at
        try:
            with Failing(at, late=late), ema_model.use_ema():
                pass
        except (MemoryError, RuntimeError):
            failed += 1
            assert_whole(ema_model, before)
        else:
            break
    assert failed >= (2 if way == "kernel" else 3)
    assert_whole(ema_model, before)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_ctrl_c_within_a_launch_comes_after_it(at, way, monkeypatch):
    """Of two launches each way, for tensors that are whole blocks and for what is left."""
    if way != "kernel":
        pytest.skip("copies are calls into C")
    model = nn.ParameterList([nn.Parameter(torch.randn(BLOCK + 3)) for _ in range(2)])
    one = EMAModel(model, 0.9)
    with torch.no_grad():
        model[0].add_(1.0)
    one.update()
    before = snapshot(one)
    launches = 0

    def interrupt(device, calls):
        nonlocal launches
        launches += 1
        if launches == at:
            signal.raise_signal(signal.SIGINT)
        exchange(device, calls)

    monkeypatch.setattr(kernels, "_launch", interrupt)
    with pytest.raises(KeyboardInterrupt), one.use_ema():
        pass
    assert_whole(one, before)
    assert launches == 4  # what was begun is finished, and then undone


@pytest.mark.usefixtures("interpreted")
def test_the_kernel_itself_swaps(way, monkeypatch):
    """In Triton's interpreter."""
    if way == "kernel":
        monkeypatch.undo()
        monkeypatch.setattr(swap_module, "many_at_once", lambda device: True)
        monkeypatch.setattr(kernels, "available", lambda device: True)
    model = make()
    one = EMAModel(model, 0.9)
    with torch.no_grad():
        for parameter in model:
            parameter.add_(1.0)
    one.update()
    before = snapshot(one)
    with one.use_ema():
        assert differences({n: p.detach() for n, p in model.named_parameters()}, before[1]) == []
    assert_whole(one, before)
