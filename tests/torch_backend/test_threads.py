"""One thread at a time: what overlaps is refused, what comes in turn or is nested works."""

import copy
import pickle
import signal
import threading

import pytest
import torch
from torch import nn

from ema import StateError
from ema.checkpoint import read_state
from ema.torch_backend import EMAModel, model, turns
from ema.torch_backend import averages as average
from ema.torch_backend import calls as calls_module
from ema.torch_backend.swap import blocks, swap
from ema.torch_backend.update import sweep
from tests.torch_backend.interruptions import (
    AtFirstOperation,
    at_bytecode,
    in_thread,
    interrupted_at,
    raise_interrupt,
    running,
)

MODULES = (average, blocks, calls_module, model, swap, sweep, turns)
SIDE = 70  # a weight is larger than SMALL, a bias is not


def trained(decay=0.5, **options):
    """An average between zeros and ones, which has a bias and a weight."""
    linear = nn.Linear(SIDE, SIDE)
    fill(linear, 0.0)
    ema_model = EMAModel(linear, decay, **options)
    fill(linear, 1.0)
    ema_model.update()
    return ema_model


def fill(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def values(tensors):
    return {name: set(tensor.flatten().tolist()) for name, tensor in tensors}


def live_of(ema_model):
    return values(ema_model.model.named_parameters())


def everywhere(value):
    return {"weight": {value}, "bias": {value}}


def calls(ema_model, folder):
    """Every public call."""
    file = ema_model.save(folder / "before")
    state = ema_model.state_dict()
    other, inputs = nn.Linear(SIDE, SIDE), torch.ones(1, SIDE)

    def block():
        with ema_model.use_ema():
            pass

    def apply_and_restore():
        ema_model.apply_ema()
        ema_model.restore_original()

    return {
        "update": ema_model.update,
        "averaged_parameters": ema_model.averaged_parameters,
        "relative_distance": ema_model.relative_distance,
        "verify_ranks": ema_model.verify_ranks,
        "call": lambda: ema_model(inputs),
        "apply_ema": apply_and_restore,
        "use_ema": block,
        "copy_to": lambda: ema_model.copy_to(other),
        "state_dict": ema_model.state_dict,
        "load_state_dict": lambda: ema_model.load_state_dict(state),
        "save": lambda: ema_model.save(folder / "saved"),
        "load": lambda: ema_model.load(file),
        "export": lambda: ema_model.export(folder / "model.safetensors"),
        "averaged_state_dict": ema_model.averaged_state_dict,
        "reset": ema_model.reset,
        "before_write": ema_model.before_write,
        "sharded": lambda: ema_model.sharded,
        "getstate": lambda: copy.deepcopy(ema_model),
    }


SILENT = {"averaged_parameters", "verify_ranks", "before_write", "sharded"}
"""Calls that make no operation of PyTorch here, so nothing can stop them in the middle."""

NAMES = [
    "update",
    "averaged_parameters",
    "relative_distance",
    "verify_ranks",
    "call",
    "apply_ema",
    "use_ema",
    "copy_to",
    "state_dict",
    "load_state_dict",
    "save",
    "load",
    "export",
    "averaged_state_dict",
    "reset",
    "before_write",
    "sharded",
    "getstate",
]


@pytest.mark.parametrize("first", [name for name in NAMES if name not in SILENT])
def test_a_call_that_overlaps_another_threads_call_is_refused(first, tmp_path):
    """Each call while another thread is in the middle of ``first``, which ends as if alone."""
    alone, ema_model = trained(), trained()
    ours = calls(ema_model, tmp_path)
    assert list(ours) == NAMES
    calls(alone, tmp_path)[first]()
    with running(ours[first]):
        for name in NAMES:
            with pytest.raises(StateError, match=f"one thread at a time .*, got `{name}` while"):
                ours[name]()
        assert not (tmp_path / "saved").exists() or first == "save"
    assert (ema_model.step, ema_model.count) == (alone.step, alone.count)
    assert live_of(ema_model) == live_of(alone) == everywhere(1.0)
    averages = ema_model.averaged_parameters()
    assert values(averages.items()) == values(alone.averaged_parameters().items())
    for name in NAMES:
        ours[name]()


def test_counters_may_be_read_beside_a_call():
    """A thread that logs is not refused, and moves nothing."""
    ema_model = trained()
    with running(ema_model.update):
        assert (ema_model.step, ema_model.count, ema_model.skipped) == (1, 1, 0)
        assert ema_model.decay == 0.5
        assert "step=1, count=1" in repr(ema_model)
    assert (ema_model.step, ema_model.count) == (2, 2)


def test_threads_may_use_it_in_turn():
    """Every call in a thread of its own: what one thread would have got."""
    alone, ema_model = trained(), trained()
    for value in range(2, 9):
        for each, where in ((alone, lambda call: call()), (ema_model, in_thread)):
            fill(each.model, value)
            where(each.update)
            where(each.apply_ema)
            assert live_of(each) != everywhere(value)
            where(each.restore_original)
            assert live_of(each) == everywhere(value)
    ours = in_thread(ema_model.state_dict)["averages"]
    assert values(ours.items()) == values(alone.averaged_parameters().items())
    assert len(set().union(*values(ours.items()).values())) == 1


@pytest.mark.parametrize("name", ["averaged_parameters", "state_dict", "use_ema", "save"])
def test_a_call_within_a_call_of_the_same_thread_works(name, tmp_path):
    """A hook of the model that uses the average while the average calls the model."""
    ema_model = trained()
    inner = calls(ema_model, tmp_path)[name]
    called = []

    def hook(*_):
        called.append(name)
        inner()

    ema_model.model.register_forward_pre_hook(hook)
    output = ema_model(torch.ones(1, SIDE))
    assert called == [name]
    assert set(output.flatten().tolist()) == {0.5 * SIDE + 0.5}
    assert live_of(ema_model) == everywhere(1.0)
    in_thread(ema_model.update)


def test_a_block_within_a_call_ends_where_it_ends():
    """And not at the end of that call."""
    ema_model = trained()
    seen = []

    def hook(module, *_):
        with ema_model.use_ema():
            seen.append(module.extra.item())
        seen.append(module.extra.item())

    ema_model.model.extra = nn.Parameter(torch.zeros(()))
    ema_model.update()
    with torch.no_grad():
        ema_model.model.extra.fill_(1.0)
    ema_model.model.register_state_dict_pre_hook(lambda *_: hook(ema_model.model))
    ema_model.averaged_state_dict()
    assert seen == [0.0, 1.0]


def test_a_block_that_is_open_in_one_thread_is_seen_by_others():
    """Their calls come in turn: what needs live weights is refused, the rest works."""
    ema_model = trained()
    with ema_model.use_ema():
        with pytest.raises(StateError, match="update is not possible while averages are swapped"):
            in_thread(ema_model.update)
        assert values(in_thread(ema_model.averaged_parameters).items()) == everywhere(0.5)
    in_thread(ema_model.update)


@pytest.mark.parametrize("assign", [False, True])
def test_a_block_that_ends_beside_a_call_raises_and_the_live_weights_come_back(assign, tmp_path):
    """Not before that call is over: what it saves are the averages, all of them."""
    ema_model = trained()
    block = ema_model.use_ema(assign=assign)
    block.__enter__()
    with running(lambda: ema_model.save(tmp_path)):
        with pytest.raises(
            StateError, match=r"end of a `use_ema\(\)` block while a call of another"
        ):
            block.__exit__(None, None, None)
        assert live_of(ema_model) == everywhere(0.5)
    assert live_of(ema_model) == everywhere(1.0)
    restored = EMAModel(nn.Linear(SIDE, SIDE), 0.5)
    restored.load(tmp_path)
    assert values(restored.averaged_parameters().items()) == everywhere(0.5)
    ema_model.update()


def test_a_block_that_ends_within_a_call_of_the_same_thread_waits_for_its_end(tmp_path):
    """A generator with a block in it is collected, or closed by a hook, in the middle of a save."""
    ema_model = trained()

    def generator():
        with ema_model.use_ema():
            yield

    inside = generator()
    next(inside)
    with AtFirstOperation(inside.close):
        ema_model.save(tmp_path)
    assert live_of(ema_model) == everywhere(1.0)
    restored = EMAModel(nn.Linear(SIDE, SIDE), 0.5)
    restored.load(tmp_path)
    assert values(restored.averaged_parameters().items()) == everywhere(0.5)


def test_saves_beside_a_training_loop_hold_one_moment_or_raise(tmp_path):
    """Whichever way two threads meet: the average of a step is the number of that step."""
    ema_model = trained(decay=0.0)
    over = threading.Event()
    outcomes = []

    def save():
        while not over.is_set():
            try:
                ema_model.save(tmp_path)
            except StateError:
                outcomes.append("refused")
                continue
            stored = read_state(tmp_path)
            found = {
                number
                for tensor in stored.tensors.values()
                for number in torch.frombuffer(tensor.bytes(), dtype=torch.float32).tolist()
            }
            outcomes.append(found == {float(stored.record.step)} and stored.record.count)

    thread = threading.Thread(target=save)
    thread.start()
    try:
        while len(outcomes) < 30:
            fill(ema_model.model, ema_model.step + 1)
            try:
                ema_model.update()
            except StateError as error:
                assert "one thread at a time" in str(error)  # noqa: PT017
    finally:
        over.set()
        thread.join()
    assert False not in outcomes


def test_a_signal_handler_that_saves_finds_one_moment():
    """At every bytecode of an update: the average of a step is the number of that step."""
    ema_model = trained(decay=0.0)
    number, more = 0, True
    moments = set()

    def look():
        state = ema_model.state_dict()
        assert state["step"] == state["count"]
        assert values(state["averages"].items()) == everywhere(float(state["step"]))
        moments.add(state["step"] - before)

    while more:
        number += 1
        before = ema_model.step
        fill(ema_model.model, before + 1)
        more = at_bytecode(number, look, ema_model.update, MODULES)
        assert ema_model.step == before + 1
    assert number > 100
    assert moments == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["update", "state_dict", "use_ema", "apply_ema"])
def test_ctrl_c_at_every_bytecode_leaves_the_turn_to_others(name, tmp_path):
    """And an update is made and counted, or neither."""
    ema_model = trained(decay=0.0)
    call = calls(ema_model, tmp_path)[name]
    number, more = 0, True
    while more:
        number += 1
        fill(ema_model.model, float(ema_model.step + 1))
        more = interrupted_at(number, raise_interrupt, call, MODULES)
        if ema_model._swap is not None and ema_model._swap.active:
            assert name == "apply_ema"  # between its two halves
            in_thread(ema_model.restore_original)
        assert live_of(ema_model) in (everywhere(ema_model.step), everywhere(ema_model.step + 1.0))
        averages = in_thread(ema_model.averaged_parameters)
        assert values(averages.items()) == everywhere(float(ema_model.count))
        assert ema_model.step == ema_model.count
    assert number > 100


def test_a_real_ctrl_c_in_the_middle_of_a_call_leaves_the_turn_to_others():
    ema_model = trained()
    with (
        pytest.raises(KeyboardInterrupt),
        AtFirstOperation(lambda: signal.raise_signal(signal.SIGINT)),
    ):
        ema_model.state_dict()
    in_thread(ema_model.update)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"]
)
def test_a_copy_made_within_a_call_is_free(duplicate):
    """Whatever thread uses it; and it is a copy of one moment."""
    ema_model = trained()
    copies = []
    with AtFirstOperation(lambda: copies.append(duplicate(ema_model))):
        ema_model.update()
    (other,) = copies
    assert (other.step, other.count) == (1, 1)
    assert values(in_thread(other.averaged_parameters).items()) == everywhere(0.5)
    in_thread(other.update)


def test_a_pickle_holds_the_moment_at_which_it_began():
    """Also where the averages move before they are written: a pickle takes its objects in turn."""

    class Slow(nn.Linear):
        def __reduce__(self):
            ema_model.update()
            return nn.Linear, (SIDE, SIDE)

    linear = Slow(SIDE, SIDE)
    fill(linear, 0.0)
    ema_model = EMAModel(linear, 0.5)
    fill(linear, 1.0)
    ema_model.update()
    other = pickle.loads(pickle.dumps(ema_model))
    assert ema_model.step == 2
    assert (other.step, other.count) == (1, 1)
    assert values(other.averaged_parameters().items()) == everywhere(0.5)
