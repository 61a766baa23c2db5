"""What runs on a GPU or beside the loop, driven through ``EMAModel``, on the CPU.

Kernels run in Triton's interpreter, averages of "another device" are brought up to date by the real
thread. The bits, the counts and the states are those of the plain update.
"""

import copy

import pytest
import torch

import ema
from ema import EMAModel
from ema.torch_backend.gpu import kernels
from ema.torch_backend.update import guard, prepared
from ema.torch_backend.update.counters import Counters
from tests.torch_backend.gpu.runs import differences, make, train

OPTIONS = [
    {},
    {"compensated": True},
    {"dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "on_nonfinite": "skip"},
    {"on_nonfinite": "skip", "decay": ema.DebiasedDecay(decay=0.9)},
    {"decay": {"short": 0.5, "long": 0.99}, "on_nonfinite": "skip", "update_every": 2},
]


@pytest.mark.parametrize(
    ("one", "other"), [(0.0, 1.0), (0.0, -0.0), (float("nan"), 0.0), (1.0, 1.0 + 2**-23)]
)
def test_the_comparison_sees_every_difference(one, other):
    """Zeros for ones too, beside a NaN in both."""
    one, other = torch.tensor([one, float("nan")]), torch.tensor([other, float("nan")])
    assert differences({"w": {"x": one}}, {"w": {"x": other}}) == [".w.x: 1 of 2"]
    assert differences({"w": one}, {"w": one.clone()}) == []


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kernels_give_the_bits_of_the_plain_update(options, live, monkeypatch):
    """Also the counts of skipped updates, which the host learns of later."""
    first, second = make(live), make(live)
    plain = EMAModel(first, **{"decay": 0.9, **options})
    monkeypatch.setattr(kernels, "available", lambda device: True)
    launched = []
    call = kernels.Fused.__call__
    monkeypatch.setattr(
        kernels.Fused, "__call__", lambda *args: (launched.append(args), call(*args))[1]
    )
    fused = EMAModel(second, **{"decay": 0.9, **options})
    for step in range(1, 9):
        train((first, second), (plain, fused), step)
    assert differences(plain.state_dict(), fused.state_dict()) == []
    assert (plain.count, plain.skipped) == (fused.count, fused.skipped)
    if options.get("on_nonfinite") == "skip":
        assert plain.skipped == (0 if "update_every" in options else 1)
    assert launched


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_average_on_the_host_is_brought_up_to_date_behind_the_step(options, monkeypatch):
    first, second = make(), make()
    plain = EMAModel(first, **{"decay": 0.9, **options})
    monkeypatch.setattr(prepared, "_is_offloaded", lambda entry: True)
    behind = EMAModel(second, **{"decay": 0.9, **options})
    assert behind._averages._bound.update._beside is not None
    name = next(iter(behind.schedules))
    for step in range(1, 60):
        train((first, second), (plain, behind), step)
        if step % 20 == 0:
            assert differences(plain.state_dict(), behind.state_dict()) == []
            with plain.use_ema(name=name), behind.use_ema(name=name):
                ours, theirs = map(dict, (first.named_parameters(), second.named_parameters()))
                assert differences(ours, theirs) == []
            second, behind = copy.deepcopy((second, behind))
    assert differences(plain.state_dict(), behind.state_dict()) == []


def test_what_fails_behind_the_step_is_raised_at_the_next_use(monkeypatch):
    monkeypatch.setattr(prepared, "_is_offloaded", lambda entry: True)
    model = make()
    behind = EMAModel(model, 0.9)

    def fail(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(type(behind._averages._bound.update._sweep), "__call__", fail)
    behind.update()
    with pytest.raises(MemoryError, match="no memory"):
        behind.averaged_parameters()


def test_overlap_changes_nothing_where_there_is_no_gpu():
    first, second = make(), make()
    plain, beside = EMAModel(first, 0.9), EMAModel(second, 0.9, overlap=True)
    for step in range(1, 5):
        beside.before_write()
        train((first, second), (plain, beside), step)
    assert differences(plain.state_dict(), beside.state_dict()) == []


def test_a_flag_is_not_asked_again_once_it_was_settled(monkeypatch):
    """An update that only the device knows to be made is counted when somebody asks."""
    asked = []
    monkeypatch.setattr(guard.DeviceFlag, "__bool__", lambda self: asked.append(self) or False)
    model = make()
    one = EMAModel(model, 0.9, on_nonfinite="skip")
    one._counters = Counters(step=2, count=2, pending=(guard.DeviceFlag(torch.tensor(False)),))
    assert (one.count, one.skipped, one.count, one.step) == (1, 1, 1, 2)
    one.state_dict()
    asked.clear()
    assert (one.count, one.skipped) == (1, 1)
    assert not asked
