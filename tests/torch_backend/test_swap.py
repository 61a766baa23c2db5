"""Averages in and live weights back: in place, and whole whatever is raised."""

import contextlib
import gc
import os
import signal
import sys
import threading
import time

import psutil
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ema import ModelError, StateError
from ema.torch_backend import EMAModel
from ema.torch_backend import calls as calls_module
from ema.torch_backend.swap import places as swap_places_module
from ema.torch_backend.swap import swap as swap_module
from ema.torch_backend.tensors.memory import CHUNK
from tests.torch_backend.interruptions import interrupted_at, raise_interrupt
from tests.torch_helpers import another, step, values


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["same-dtype", "other-dtype"])
def trained(request, model):
    """A model whose average is elsewhere, and its EMAModel."""
    model.to(request.param)
    ema_model = EMAModel(model, 0.9)
    for _ in range(3):
        step(model)
        ema_model.update()
    return model, ema_model


def snapshot(ema_model):
    """Live weights and averages."""
    live = {n: p.detach().clone() for n, p in ema_model.model.named_parameters()}
    return live, {n: a.clone() for n, a in ema_model.averaged_parameters().items()}


def assert_whole(ema_model, before):
    live, averages = snapshot(ema_model)
    assert all(torch.equal(live[name], before[0][name]) for name in before[0])
    assert all(torch.equal(averages[name], before[1][name]) for name in before[1])


assigned_or_not = pytest.mark.parametrize("assign", [False, True], ids=["values", "assign"])


@assigned_or_not
def test_averages_inside_the_block_and_live_weights_after_it(trained, assign):
    model, ema_model = trained
    before = snapshot(ema_model)
    pointers = [p.data_ptr() for p in model.parameters()]
    with ema_model.use_ema(assign=assign) as averaged:
        assert averaged is model
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[1][name].to(parameter.dtype))
        assert (pointers == [p.data_ptr() for p in model.parameters()]) is not assign
        inside = ema_model.averaged_parameters()
        assert all(torch.equal(inside[name], before[1][name]) for name in inside)
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert_whole(ema_model, before)


def test_nested_blocks_of_one_average_swap_once(trained):
    model, ema_model = trained
    before = snapshot(ema_model)
    with ema_model.use_ema():
        with ema_model.use_ema():
            pass
        ema_model.apply_ema()
        assert torch.equal(model.first.weight, before[1]["first.weight"].to(model.first.weight))
    assert_whole(ema_model, before)


def test_apply_and_restore(trained):
    model, ema_model = trained
    before = snapshot(ema_model)
    for _ in range(2):
        ema_model.apply_ema()
        ema_model.apply_ema(model)
        with ema_model.use_ema():
            pass
        assert torch.equal(model.first.bias, before[1]["first.bias"].to(model.first.bias))
        ema_model.restore_original(model)
        assert_whole(ema_model, before)
    with pytest.raises(StateError, match="needs an apply_ema"):
        ema_model.restore_original()


def test_what_is_refused_while_averages_are_in(trained):
    """Nothing that would mix the two up is possible, and nothing is changed by trying."""
    model, ema_model = trained
    before = snapshot(ema_model)
    state = ema_model.state_dict()
    with ema_model.use_ema():
        for call in (
            ema_model.update,
            ema_model.reset,
            lambda: ema_model.load_state_dict(state),
            lambda: ema_model.copy_to(model),
            lambda: ema_model.restore_original(nn.Linear(1, 1)),
            ema_model.__getstate__,
        ):
            with pytest.raises(StateError, match=r"swapped"):
                call()
    assert (ema_model.step, ema_model.count) == (3, 3)
    assert_whole(ema_model, before)


def test_another_average_of_the_same_model_is_refused(trained):
    model, ema_model = trained
    other = EMAModel(model.first, 0.5)
    before = snapshot(ema_model)
    with (
        ema_model.use_ema(),
        pytest.raises(StateError, match="another average is swapped into `weight`"),
        other.use_ema(),
    ):
        pass
    assert_whole(ema_model, before)
    with other.use_ema():
        pass


@assigned_or_not
def test_another_model_with_the_same_names(trained, assign):
    """The averages go into another model and come back from it; ours is not touched."""
    _, ema_model = trained
    before = snapshot(ema_model)
    target = another()
    theirs = values(target)
    with ema_model.use_ema(target, assign=assign):
        assert torch.equal(target.first.weight, before[1]["first.weight"])
        assert all(torch.equal(a, before[1][n]) for n, a in ema_model.averaged_parameters().items())
        with pytest.raises(StateError, match="another model"):
            ema_model.apply_ema()
    assert all(torch.equal(p, theirs[n]) for n, p in target.named_parameters())
    assert_whole(ema_model, before)


def test_a_model_that_does_not_fit_is_refused_with_all_differences(trained):
    _, ema_model = trained
    before = snapshot(ema_model)
    target = nn.ModuleDict({"first": nn.Linear(4, 9), "norm": nn.BatchNorm1d(8), "x": nn.ReLU()})
    target["third"] = nn.Linear(1, 1)
    for call in (ema_model.apply_ema, ema_model.copy_to):
        with pytest.raises(ModelError) as error:
            call(target)
        for part in (
            "missing: `second.",
            "unexpected: `third.",
            "`first.weight` has shape (9, 4), here it is (8, 4)",
        ):
            assert part in str(error.value)
    assert_whole(ema_model, before)


def test_copy_to_writes_a_whole_averaged_model(trained):
    """Averages, frozen parameters and buffers arrive; the live model keeps its own."""
    model, ema_model = trained
    model.norm.running_mean.fill_(3)
    before = snapshot(ema_model)
    target = another()
    ema_model.copy_to(target)
    assert torch.equal(target.first.weight, before[1]["first.weight"])
    assert torch.equal(target.norm.running_mean, model.norm.running_mean.float())
    assert_whole(ema_model, before)
    ema_model.copy_to(model)
    assert torch.equal(model.first.weight, before[1]["first.weight"].to(model.first.weight))


def test_before_the_start_a_swap_changes_nothing(model):
    ema_model = EMAModel(model, update_after_step=9)
    step(model)
    ema_model.update()
    before = snapshot(ema_model)
    target = another()
    with ema_model.use_ema():
        assert torch.equal(model.first.weight, before[0]["first.weight"])
    with ema_model.use_ema(target):
        assert torch.equal(target.first.weight, before[0]["first.weight"])
    assert_whole(ema_model, before)


@assigned_or_not
def test_an_exception_in_the_block_restores_and_goes_on(trained, assign):
    _, ema_model = trained
    before = snapshot(ema_model)
    with pytest.raises(ZeroDivisionError), ema_model.use_ema(assign=assign):
        1 / 0  # noqa: B018
    assert_whole(ema_model, before)
    ema_model.update()


class Failing(TorchDispatchMode):
    """Raises at the n-th copy, before or after it was made."""

    def __init__(self, at, *, late):
        super().__init__()
        self.left, self.late = at, late

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.left -= 1
        fails = self.left == 0 and func is torch.ops.aten.copy_.default
        if fails and not self.late:
            raise MemoryError
        result = func(*args, **(kwargs or {}))
        if fails:
            raise MemoryError
        return result


@assigned_or_not
@pytest.mark.parametrize("late", [False, True])
def test_a_failing_copy_anywhere_leaves_the_live_weights(trained, late, assign):
    """Each copy of a swap fails once, on the way in and on the way back."""
    _, ema_model = trained
    before = snapshot(ema_model)
    failed = 0
    for at in range(1, 1000):
        try:
            with Failing(at, late=late), ema_model.use_ema(assign=assign):
                pass
        except MemoryError:
            failed += 1
            assert_whole(ema_model, before)
        else:
            break
    # six small tensors: one copy for each, or three and more
    assert failed >= (6 if assign else 18)
    assert_whole(ema_model, before)


def interrupt_at(number, call):
    """Raise KeyboardInterrupt at the n-th bytecode in the swap's own code; False: it ended before."""
    modules = (swap_module, swap_places_module, calls_module, sys.modules[EMAModel.__module__])
    return interrupted_at(number, raise_interrupt, call, modules)


@pytest.mark.slow
@assigned_or_not
def test_ctrl_c_at_every_bytecode_of_a_swap_leaves_the_live_weights(trained, assign):
    """Exhaustively: an interrupt at each bytecode of entering and leaving the block."""
    _, ema_model = trained
    before = snapshot(ema_model)

    def swap():
        with ema_model.use_ema(assign=assign):
            pass

    number = 0
    interrupted = True
    while interrupted:
        number += 1
        interrupted = interrupt_at(number, swap)
        assert not (ema_model._swap is not None and ema_model._swap.active)
        assert_whole(ema_model, before)
    assert number > 500
    with ema_model.use_ema():
        pass


@pytest.mark.slow
@assigned_or_not
def test_real_ctrl_c_at_random_moments_leaves_the_live_weights(assign, monkeypatch):
    """SIGINT from another thread, again and again, while a larger model is swapped."""
    model = nn.ParameterList([nn.Parameter(torch.randn(3 * CHUNK + 5)) for _ in range(4)])
    ema_model = EMAModel(model, 0.5)
    with torch.no_grad():
        for parameter in model:
            parameter.add_(1)
    ema_model.update()
    before = snapshot(ema_model)
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: dropped.append(what.exc_type))

    def swap():
        with ema_model.use_ema(assign=assign):
            pass

    came_out = 0
    gc.disable()  # where JAX is imported, collections call Python code
    try:
        for number in range(40):
            for _ in range(5):  # Python drops what is raised in a weakref's callback
                out = interrupted_from_outside(swap, after=number)
                assert_whole(ema_model, before)
                came_out += out
                if out:
                    break
    finally:
        gc.enable()
    assert came_out > 0
    assert {kind for kind in dropped if not issubclass(kind, Warning)} <= {KeyboardInterrupt}


def interrupted_from_outside(call, after):
    """Repeat a call until another thread's SIGINT was handled; whether it came out of the call.

    The other thread sends it when it has had its turn ``after`` times: the calls into C let it in.
    """
    came = threading.Event()
    begun = threading.Event()

    def handler(number, frame):
        came.set()
        raise KeyboardInterrupt

    def send():
        begun.wait()
        for _ in range(after):
            time.sleep(0)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    previous = signal.signal(signal.SIGINT, handler)
    try:
        begun.set()
        while not came.is_set():
            call()
    except KeyboardInterrupt:
        return True
    finally:
        sender.join()
        signal.signal(signal.SIGINT, previous)
    return False


@pytest.mark.slow
@assigned_or_not
def test_a_swap_needs_one_chunk_of_memory(assign):
    """Where dtypes agree no third copy is made: the process grows by a few MiB."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(64 * CHUNK))])
    ema_model = EMAModel(model)
    with ema_model.use_ema(assign=assign):
        pass
    process = psutil.Process()
    before = process.memory_info().rss
    with ema_model.use_ema(assign=assign):
        grown = process.memory_info().rss - before
    assert grown < 16 * 2**20


def test_parameters_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    ema_model = EMAModel(model)
    with pytest.raises(StateError, match="inference mode"), ema_model.use_ema():
        pass


def test_backward_through_weights_that_a_swap_has_touched_is_loud(model):
    """A graph that was built before a swap cannot be used by mistake after it."""
    ema_model = EMAModel(model, 0.5)
    loss = model(torch.randn(8, 4)).sum()
    with ema_model.use_ema():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@assigned_or_not
def test_autocast_casts_the_weights_that_are_in(assign):
    """Within one autocast block PyTorch casts a weight once and keeps the result."""
    model = nn.Linear(80, 80)
    ema_model = EMAModel(model, 0.5)
    with torch.no_grad():
        model.weight.add_(2)
    ema_model.update()
    inputs = torch.ones(1, 80)
    with torch.autocast("cpu", torch.bfloat16):
        live = model(inputs)
        with ema_model.use_ema(assign=assign):
            inside, expected = model(inputs), ema_model(inputs)
        after = model(inputs)
        ema_model.copy_to(model)
        written = model(inputs)
    assert torch.equal(inside, expected)
    assert not torch.equal(inside, live)
    assert torch.equal(after, live)
    assert torch.equal(written, expected)


@pytest.mark.parametrize("after", [0, 5])
def test_the_averages_of_another_are_not_taken_for_live_weights(model, after):
    """Neither by an update nor where an average still equals the live weights."""
    short, long = EMAModel(model, 0.5), EMAModel(model, 0.9, update_after_step=after)
    step(model)
    short.update()
    calls = [long.update, long.reset, long.relative_distance]
    if after:
        calls += [long.state_dict, long.averaged_parameters, long.apply_ema]
    before = (long.step, long.count)
    with short.use_ema():
        for call in calls:
            with pytest.raises(StateError, match=r"another average .* `first.weight`"):
                call()
    assert (long.step, long.count) == before
    long.update()


def test_averages_of_other_tensors_are_no_hindrance(model):
    """Two averages that share no tensor go on independently of each other."""
    first = EMAModel(model, 0.5, include="first.*")
    second = EMAModel(model, 0.5, include="second.*")
    step(model)
    with first.use_ema(), second.use_ema():
        pass
    with first.use_ema():
        second.update()
    assert second.count == 1


def trained_everywhere():
    """A model with a tie by memory and averaged buffers; live it is 8 all over, its average 4."""
    model = nn.Sequential(nn.Linear(80, 80), nn.BatchNorm1d(80), nn.Linear(80, 80, bias=False))
    model[2].weight = nn.Parameter(model[0].weight.detach())
    write(model, 0.0)
    ema_model = EMAModel(model, 0.5, buffers="average")
    write(model, 8.0)
    ema_model.update()
    return model, ema_model


def write(model, value):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(value)


def numbers_in(model):
    """The values of each floating-point tensor of a model by its name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.unique().tolist() for n, t in named if t.is_floating_point()}


def assert_live(model, ema_model, value=8.0):
    """The model holds this value all over, the averages hold 4, and training changes none of these."""
    assert set(map(tuple, numbers_in(model).values())) == {(value,)}
    write(model, 77.0)
    averages = ema_model.averaged_parameters().values()
    assert {tuple(average.unique().tolist()) for average in averages} == {(4.0,)}


CONVERSIONS = {
    "double": nn.Module.double,
    "half": nn.Module.half,
    "to": lambda model: model.to("cpu", torch.bfloat16),
    "there and back": lambda model: model.half().float(),
    "nothing to convert": nn.Module.float,
    "shared memory": nn.Module.share_memory,
}
conversions = pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())


@conversions
@assigned_or_not
@pytest.mark.parametrize("replacing", [False, True], ids=["as-usual", "new-parameters"])
def test_a_model_that_is_converted_in_the_block_gets_all_live_values(convert, assign, replacing):
    """Buffers that a cast has replaced too, and parameters that it has parted from each other."""
    model, ema_model = trained_everywhere()
    with overwriting_parameters(replacing), ema_model.use_ema(assign=assign):
        convert(model)
        dtypes = [tensor.dtype for tensor in model.state_dict().values()]
    assert dtypes == [tensor.dtype for tensor in model.state_dict().values()]
    assert_live(model, ema_model)
    ema_model.update()


@contextlib.contextmanager
def overwriting_parameters(replacing):
    """Whether a cast makes new parameters, which PyTorch can be told to do."""
    torch.__future__.set_overwrite_module_params_on_conversion(replacing)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@conversions
@assigned_or_not
def test_another_model_that_is_converted_in_the_block_gets_its_values_back(convert, assign):
    model, ema_model = trained_everywhere()
    other, _ = trained_everywhere()
    write(other, 3.0)
    with ema_model.use_ema(other, assign=assign):
        convert(other)
    assert set(map(tuple, numbers_in(other).values())) == {(3.0,)}
    assert_live(model, ema_model)


def test_apply_and_restore_around_a_conversion():
    model, ema_model = trained_everywhere()
    ema_model.apply_ema()
    model.double()
    ema_model.restore_original()
    assert_live(model, ema_model)


@assigned_or_not
def test_several_conversions_in_one_block_round_the_live_values_once(assign):
    model, ema_model = trained_everywhere()
    write(model, 1.1)
    with ema_model.use_ema(assign=assign):
        model.half().double()
    assert_live(model, ema_model, value=torch.tensor(1.1).item())


WRITES = {
    "another memory": lambda model: setattr(model[0].weight, "data", torch.ones(80, 80)),
    "another shape": lambda model: setattr(model[0].weight, "data", torch.ones(3)),
    "a transposed view": lambda model: setattr(model[0].weight, "data", model[0].weight.data.t()),
    "a parameter in the same memory": lambda model: setattr(
        model[0], "weight", nn.Parameter(model[0].weight.detach())
    ),
    "a computed buffer": lambda model: setattr(
        model[1], "running_mean", model[1].running_mean * 0.9
    ),
    "a buffer in the same memory": lambda model: setattr(
        model[1], "running_mean", model[1].running_mean.detach()
    ),
    "a buffer of another shape": lambda model: setattr(model[1], "running_var", torch.ones(3)),
    "a sparse buffer": lambda model: setattr(model[1], "running_var", torch.eye(80).to_sparse()),
}


@pytest.mark.parametrize("write_one", WRITES.values(), ids=WRITES.keys())
@assigned_or_not
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_what_is_set_in_the_block_is_lost(write_one, assign, inference):
    """``.data``, and buffers, which ``forward`` may assign: live values are back, no average stays."""
    model, ema_model = trained_everywhere()
    with ema_model.use_ema(assign=assign), torch.inference_mode(inference):
        write_one(model)
    assert_live(model, ema_model)


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean"])
def test_what_is_removed_in_the_block_stays_removed(name):
    model, ema_model = trained_everywhere()
    module, _, key = name.rpartition(".")
    with ema_model.use_ema():
        delattr(model.get_submodule(module), key)
    assert name not in numbers_in(model)
    assert set(map(tuple, numbers_in(model).values())) == {(8.0,)}


def test_a_teacher_and_an_export_see_averages_of_a_model_that_was_converted_in_the_block():
    """Of the buffers too, which are other objects by then, here or in the live model beside it."""
    for into in (None, trained_everywhere()[0]):
        model, ema_model = trained_everywhere()
        with ema_model.use_ema(into):
            model.double().eval()
            exported = ema_model.averaged_state_dict()
            output = ema_model(torch.full((1, 80), 4.0, dtype=torch.float64))
        floats = [tensor for tensor in exported.values() if tensor.is_floating_point()]
        assert {tensor.dtype for tensor in floats} == {torch.float64}
        assert set(torch.cat([tensor.flatten() for tensor in floats]).tolist()) == {4.0}
        assert output.dtype == torch.float64
        assert_live(model, ema_model)


@conversions
def test_a_failing_copy_after_a_conversion_is_made_again(convert):
    """Each copy of a swap fails once, on the way in and on the way back."""
    for at in range(1, 1000):
        model, ema_model = trained_everywhere()
        try:
            with Failing(at, late=at % 2), ema_model.use_ema():
                convert(model)
        except MemoryError:
            assert_live(model, ema_model)
        else:
            break
    assert at > 30


@pytest.mark.slow
@assigned_or_not
def test_ctrl_c_at_every_bytecode_after_a_conversion_leaves_the_live_weights(assign):
    number = 0
    interrupted = True
    while interrupted:
        number += 1
        model, ema_model = trained_everywhere()
        ema_model.apply_ema(assign=assign)
        model.double()
        interrupted = interrupt_at(number, ema_model.restore_original)
        if ema_model._swap is not None:
            assert interrupted
            if ema_model._swap.active:
                ema_model.restore_original()
        assert_live(model, ema_model)
    assert number > 300
