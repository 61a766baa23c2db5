"""A load, a reset or a copy has happened or has not; where one broke off, the average says so."""

import copy
import os
import pickle
import signal
from functools import partial

import pytest
import torch
from torch import nn

from ema import CheckpointError, ModelError, StateError
from ema.torch_backend import EMACallback, EMAModel, calls, model
from ema.torch_backend import averages as average
from ema.torch_backend.tensors import sharding
from ema.torch_backend.trainer import run_average
from tests.torch_backend.interruptions import AtFirstOperation, interrupted_at

MODULES = (average, calls, model, run_average)
INCOMPLETE = "a load of the average broke off: load or reset before anything else"


def fill(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def averaged(updates=1, decay=0.0, **options):
    """The average of n updates is n everywhere."""
    linear = nn.Linear(3, 2)
    ema_model = EMAModel(linear, decay, **options)
    for number in range(1, updates + 1):
        fill(linear, number)
        ema_model.update()
    return ema_model


def numbers(tensors):
    return {value for tensor in tensors for value in tensor.flatten().tolist()}


def moment(ema_model, name=None):
    """Steps, updates, and all values of the average."""
    averages = ema_model.averaged_parameters(name).values()
    return ema_model.step, ema_model.count, numbers(averages)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def uses(ema_model, folder):
    """All that needs an average."""
    inputs, other = torch.ones(1, 3), nn.Linear(3, 2)

    def block():
        with ema_model.use_ema():
            pass

    return {
        "update": ema_model.update,
        "averaged_parameters": ema_model.averaged_parameters,
        "relative_distance": ema_model.relative_distance,
        "verify_ranks": ema_model.verify_ranks,
        "call": lambda: ema_model(inputs),
        "apply_ema": ema_model.apply_ema,
        "use_ema": block,
        "copy_to": lambda: ema_model.copy_to(other),
        "state_dict": ema_model.state_dict,
        "save": lambda: ema_model.save(folder / "never"),
        "export": lambda: ema_model.export(folder / "never.safetensors"),
        "averaged_state_dict": ema_model.averaged_state_dict,
        "sharded": lambda: ema_model.sharded,
        "deepcopy": lambda: copy.deepcopy(ema_model),
        "pickle": lambda: pickle.dumps(ema_model),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("way", "stride"), [("load", 7), ("load_state_dict", 1), ("reset", 1)])
def test_ctrl_c_at_any_bytecode_finds_it_done_or_not_begun(way, stride, tmp_path):
    """Averages, counters and the notes of the file change together, by a real signal."""
    source, ema_model = averaged(5), averaged(2)
    file = source.save(tmp_path / "new", metadata={"of": "new"})
    state, before = source.state_dict(), ema_model.save(tmp_path / "old", metadata={"of": "old"})
    ema_model.load(before)
    fill(ema_model.model, 9.0)
    call, after = {
        "load": (partial(ema_model.load, file), (5, 5, {5.0}, "new")),
        "load_state_dict": (partial(ema_model.load_state_dict, state), (5, 5, {5.0}, "old")),
        "reset": (ema_model.reset, (0, 0, {9.0}, "old")),
    }[way]
    number, more, done = 0, True, []
    while more:
        number += stride
        more = interrupted_at(number, ctrl_c, call, MODULES)
        found = (*moment(ema_model), ema_model._file_metadata["of"])
        done.append(found == after)
        if done[-1]:
            ema_model.load(before)
        else:
            assert found == (2, 2, {2.0}, "old")
    assert number > 100
    assert done.index(True) > 50 / stride
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize(("with_model", "stride"), [(False, 1), (True, 7)])
def test_ctrl_c_at_any_bytecode_of_load_ema_state(with_model, stride):
    """The next training goes on with the state, or with nothing of it."""
    old, state = averaged(2).state_dict(), averaged(5).state_dict()
    number, more = 0, True
    seen = set()
    while more:
        number += stride
        callback = EMACallback(0.0)
        if with_model:
            callback.load_ema_state(old)
            callback._run.fit(nn.Linear(3, 2))
            callback._run._go_on = False
        load = partial(callback.load_ema_state, state)
        more = interrupted_at(number, ctrl_c, load, MODULES)
        loaded = callback.has_average and callback.get_ema_state()["step"] == 5
        assert callback._run._go_on is loaded
        seen.add(loaded)
    assert number > (100 if with_model else 10)
    assert seen == {False, True}


@pytest.mark.slow
def test_ctrl_c_at_every_bytecode_of_copy_to():
    """All of the other model is written, or none of it."""
    ema_model = averaged(3)
    number, more = 0, True
    seen = []
    while more:
        number += 1
        other = nn.Linear(3, 2)
        fill(other, 7.0)
        more = interrupted_at(number, ctrl_c, partial(ema_model.copy_to, other), MODULES)
        seen.append(numbers(other.parameters()))
        assert seen[-1] in ({7.0}, {3.0})
    assert {7.0} in seen
    assert {3.0} in seen


def test_ctrl_c_between_two_tensors_waits_for_the_last_one(tmp_path):
    """It comes while the first of them is read, and is raised when all are assigned."""
    ema_model, read = averaged(2), []

    def transform(name, tensor):
        read.append(name)
        if read.count(name) == 3:  # the third time it is assigned
            os.kill(os.getpid(), signal.SIGINT)
        return tensor

    file = averaged(5).save(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ema_model.load(file, transform=transform)
    assert sorted(read) == ["bias"] * 3 + ["weight"] * 3
    assert moment(ema_model) == (5, 5, {5.0})


def broken_off(ema_model, folder, name=None):
    """A load that fails when the second tensor is to be assigned; the file of it."""
    file = averaged(5, ema_model._settings.schedules if name else 0.0).save(folder, name=name)
    read = []

    def transform(key, tensor):
        read.append(key)
        if len(read) > 4 and len(set(read[4:])) == 2:
            raise OSError("the disk is gone")
        return tensor

    with pytest.raises(CheckpointError, match="cannot be read: the disk is gone"):
        ema_model.load(file, name=name, transform=transform)
    assert len(read) == 6
    return file


def test_after_a_load_that_broke_off_every_use_says_so(tmp_path):
    """Until a load or a reset succeeds; whatever fails meanwhile changes nothing of that."""
    ema_model = averaged(2)
    fill(ema_model.model, 9.0)
    file = broken_off(ema_model, tmp_path)
    assert (ema_model.step, ema_model.count) == (2, 2)
    for use in uses(ema_model, tmp_path).values():
        with pytest.raises(StateError, match=INCOMPLETE):
            use()
    with pytest.raises(CheckpointError):
        ema_model.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError):
        ema_model.load_state_dict({})
    with pytest.raises(StateError, match=INCOMPLETE):
        ema_model.update()
    assert not list(tmp_path.glob("never*"))
    assert numbers(ema_model.model.parameters()) == {9.0}
    ema_model.load(file)
    assert moment(ema_model) == (5, 5, {5.0})
    for use in uses(ema_model, tmp_path).values():
        use()
        if use == ema_model.apply_ema:
            ema_model.restore_original()


@pytest.mark.parametrize("way", ["reset", "load_state_dict"])
def test_a_reset_or_another_state_ends_it(way, tmp_path):
    ema_model, state = averaged(2), averaged(3).state_dict()
    broken_off(ema_model, tmp_path)
    if way == "reset":
        ema_model.reset()
        assert moment(ema_model) == (0, 0, {2.0})
    else:
        ema_model.load_state_dict(state)
        assert moment(ema_model) == (3, 3, {3.0})
    ema_model.update()


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}], ids=str)
def test_a_file_that_is_shortened_after_it_was_checked(options, tmp_path):
    """Real bytes that are gone by the time they are to be assigned: an error, and no crash."""
    ema_model, source = averaged(2, **options), averaged(5, **options)
    file = source.save(tmp_path)
    read = []

    def transform(name, tensor):
        read.append(name)
        if read.count(name) == 3:
            os.truncate(file, file.stat().st_size - 1)
        return tensor

    with pytest.raises(CheckpointError, match="the file was shortened while it was being read"):
        ema_model.load(file, transform=transform)
    with pytest.raises(StateError, match=INCOMPLETE):
        ema_model.update()
    ema_model.load(source.save(tmp_path))
    assert moment(ema_model) == (5, 5, {5.0})


def test_what_fails_before_the_first_byte_is_assigned_changes_nothing(tmp_path):
    """A transform that fails while the tensors are checked; a file that is short by then."""
    ema_model = averaged(2)
    file = averaged(5).save(tmp_path)
    for at in range(1, 5):
        read = []

        def transform(name, tensor, at=at, read=read):
            read.append(name)
            if len(read) == at:
                raise OSError("the disk is gone")
            return tensor

        with pytest.raises(CheckpointError, match="the disk is gone"):
            ema_model.load(file, transform=transform)
        assert moment(ema_model) == (2, 2, {2.0})
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(CheckpointError):
        ema_model.load(file)
    assert moment(ema_model) == (2, 2, {2.0})
    ema_model.update()


def test_one_of_several_broke_off(tmp_path):
    """The other one is as it was and can be read; both are needed for an update."""
    ema_model = averaged(2, {"a": 0.0, "b": 0.0})
    file = broken_off(ema_model, tmp_path, "a")
    message = "a load of the averages `a` broke off"
    with pytest.raises(StateError, match=message):
        ema_model.averaged_parameters("a")
    with pytest.raises(StateError, match=message):
        ema_model.update()
    with pytest.raises(StateError, match=message):
        ema_model.state_dict()
    assert moment(ema_model, "b") == (2, 2, {2.0})
    with ema_model.use_ema("b"):
        pass
    saved = ema_model.save(tmp_path / "b", name="b")
    with pytest.raises(StateError, match=message):  # which may not be counted on from another file
        ema_model.load(saved, name="b")
    ema_model.load(file, name="a")
    assert moment(ema_model, "a") == (5, 5, {5.0})
    assert moment(ema_model, "b") == (5, 5, {2.0})
    ema_model.update()


def test_a_load_takes_one_tensor_at_a_time(tmp_path):
    """Nothing is read ahead: a tensor is assigned before the next one is asked for."""
    ema_model = averaged(2)
    read = []

    def transform(name, tensor):
        read.append((name, numbers(ema_model._averages.held(0)["weight"])))
        return tensor

    ema_model.load(averaged(5).save(tmp_path), transform=transform)
    (first, before), (second, after) = read[-2:]
    assert {first, second} == {"weight", "bias"}
    assert (before, after) == (({2.0}, {5.0}) if first == "weight" else ({2.0}, {2.0}))


def test_a_copy_that_breaks_off_while_it_is_unpacked(monkeypatch):
    """A pickle takes its values over at the first use: no memory then, and it says so later."""
    ema_model = pickle.loads(pickle.dumps(averaged(2)))

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(sharding.Box, "part", fail)
    with pytest.raises(MemoryError):
        ema_model.averaged_parameters()
    monkeypatch.undo()
    with pytest.raises(StateError, match=INCOMPLETE):
        ema_model.averaged_parameters()
    ema_model.reset()
    ema_model.update()


class TestCopyToRefuses:
    """Before a byte of the other model has changed."""

    def of(self, ema_model, other, error, message):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(error, match=message):
            ema_model.copy_to(other)
        after = other.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_what_was_made_in_inference_mode(self):
        with torch.inference_mode():
            other = nn.Linear(3, 2)
        other.weight = nn.Parameter(torch.zeros(2, 3))
        self.of(averaged(), other, ModelError, "`bias` was made in inference mode")
        with torch.inference_mode():
            averaged().copy_to(other)
        assert numbers(other.parameters()) == {1.0}

    def test_buffers_whose_elements_share_memory(self):
        def make(value):
            linear = nn.Linear(3, 2)
            linear.register_buffer("mask", torch.full((1,), value).expand(4))
            return linear

        self.of(EMAModel(make(1.0)), make(2.0), ModelError, "`mask` repeats its elements")

    def test_a_model_that_holds_the_averages_of_another(self):
        other = nn.Linear(3, 2)
        theirs = EMAModel(other)
        fill(other, 8.0)
        with theirs.use_ema():
            self.of(averaged(), other, StateError, "another average is swapped into `weight`")
        assert numbers(other.parameters()) == {8.0}


def test_an_operation_that_fails_in_the_middle_of_an_update_moves_no_counter():
    """Memory that is gone, for instance."""

    def fail():
        raise MemoryError

    ema_model = averaged(2)
    with pytest.raises(MemoryError), AtFirstOperation(fail, "_foreach_copy_"):
        ema_model.update()
    assert moment(ema_model) == (2, 2, {2.0})
    ema_model.update()
    assert (ema_model.step, ema_model.count) == (3, 3)
