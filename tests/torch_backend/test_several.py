"""Several averages of one model, from one pass over its parameters."""

import copy
import io

import pytest
import torch
from torch import nn

import ema
from ema import ArgumentError, ArgumentTypeError, CheckpointError, StateError
from ema.torch_backend import EMAModel
from ema.torch_backend.tensors.memory import CHUNK
from tests.torch_helpers import another, assert_same, step, values

DECAYS = {"short": 0.5, "long": ema.HalfLife(steps=10)}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def kinds(request):
    """Small and large, dense and not, of the average's dtype and of another."""
    torch.manual_seed(0)
    large = nn.Parameter(torch.randn(CHUNK + 5).to(request.param))
    odd = nn.Parameter(torch.randn(30, 8).to(request.param)[:, ::2])
    return nn.ParameterList([nn.Parameter(torch.randn(7).to(request.param)), large, odd])


@pytest.mark.parametrize("options", [{}, {"update_every": 2, "update_after_step": 1}])
def test_each_has_the_bits_of_an_average_of_its_own(kinds, options):
    both = EMAModel(kinds, DECAYS, **options)
    alone = {name: EMAModel(kinds, decay, **options) for name, decay in DECAYS.items()}
    for _ in range(5):
        step(kinds)
        for ema_model in (both, *alone.values()):
            ema_model.update()
        for name, ema_model in alone.items():
            assert_same(both.averaged_parameters(name), ema_model.averaged_parameters())
    assert both.schedules == {
        "short": ema.ConstantDecay(decay=0.5),
        "long": ema.HalfLife(steps=10),
    }


def test_params_are_read_once():
    """What is converted is converted once for all averages."""
    model = nn.ParameterList([nn.Parameter(torch.randn(CHUNK * 2, dtype=torch.bfloat16))])
    ema_model = EMAModel(model, {"a": 0.1, "b": 0.2, "c": 0.3})
    with torch.profiler.profile(acc_events=True) as profile:  # without it torch 2.11 warns
        ema_model.update()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::copy_"] == 2
    assert counts["aten::_foreach_lerp_"] == 6


def test_each_is_swapped_in_by_its_name(model):
    ema_model = EMAModel(model, DECAYS)
    for _ in range(3):
        step(model)
        ema_model.update()
    live = values(model)
    averages = {
        name: {k: v.clone() for k, v in ema_model.averaged_parameters(name).items()}
        for name in DECAYS
    }
    for name in DECAYS:
        with ema_model.use_ema(name):
            assert_same(values(model), averages[name])
            for other in DECAYS:
                assert_same(dict(ema_model.averaged_parameters(other)), averages[other])
            state = ema_model.state_dict()["averages"]
            with ema_model.use_ema(name=name):
                pass
            with pytest.raises(StateError, match="another one or into another model"):
                ema_model.apply_ema(name=next(n for n in DECAYS if n != name))
        assert_same(values(model), live)
        for other in DECAYS:
            assert_same(state[other], averages[other])
    ema_model.apply_ema(name="long")
    ema_model.restore_original()
    assert_same(values(model), live)


def test_another_model_takes_any_of_them(model):
    ema_model = EMAModel(model, DECAYS)
    step(model)
    ema_model.update()
    target = another()
    ema_model.copy_to(target, name="short")
    expected = ema_model.averaged_parameters("short")["first.weight"]
    assert torch.equal(target.first.weight, expected)
    assert ema_model.relative_distance("short") > 0


def test_state_round_trip_and_copies(model):
    ema_model = EMAModel(model, DECAYS)
    for _ in range(3):
        step(model)
        ema_model.update()
    file = io.BytesIO()
    torch.save(ema_model.state_dict(), file)
    file.seek(0)
    loaded = EMAModel(another(), DECAYS)
    loaded.load_state_dict(torch.load(file))
    copied = copy.deepcopy(ema_model)
    for name in DECAYS:
        for other in (loaded, copied):
            assert_same(other.averaged_parameters(name), ema_model.averaged_parameters(name))
    assert loaded.step == 3


def test_a_state_with_other_averages_is_refused(model):
    several, single = EMAModel(model, DECAYS), EMAModel(model, 0.5)
    with pytest.raises(CheckpointError, match="holds several averages, `short`, `long`"):
        single.load_state_dict(several.state_dict())
    with pytest.raises(CheckpointError, match="holds other averages: missing: `short`, `long`"):
        several.load_state_dict(single.state_dict())
    with pytest.raises(CheckpointError, match="missing: `long`; unexpected: `slow`"):
        several.load_state_dict(EMAModel(model, {"short": 0.5, "slow": 0.9}).state_dict())
    spoiled = several.state_dict()
    del spoiled["averages"]["long"]["first.weight"]
    with pytest.raises(CheckpointError, match="not of the same tensors: missing: `first"):
        several.load_state_dict(spoiled)


def test_bad_input(model):
    ema_model = EMAModel(model, DECAYS)
    for call in (ema_model.averaged_parameters, ema_model.apply_ema):
        with pytest.raises(ArgumentError, match="`name` must be one of `short`, `long`, got None"):
            call()
    with pytest.raises(ArgumentError, match="got 'longer'"), ema_model.use_ema("longer"):
        pass
    for attribute in ("schedule", "decay"):
        with pytest.raises(StateError, match="several averages, `short`, `long`"):
            getattr(ema_model, attribute)
    with pytest.raises(StateError, match="calling is for one average"):
        ema_model(torch.randn(2, 4))
    with pytest.raises(ArgumentError, match="`name` must not be given for one average"):
        EMAModel(model, 0.5).averaged_parameters("short")
    with pytest.raises(ArgumentError, match="at least one average"):
        EMAModel(model, {})
    with pytest.raises(ArgumentTypeError, match="must name averages by strings, got 3"):
        EMAModel(model, {3: 0.5})
    with pytest.raises(ArgumentError, match=r"`decay\['a'\]` must lie in \[0, 1\], got 2.0"):
        EMAModel(model, {"a": 2})


def test_before_the_start_a_state_taken_in_a_block_is_whole(model):
    """While the averages equal the live weights a block changes nothing, its state is complete."""
    ema_model = EMAModel(model, 0.5, update_after_step=5)
    with ema_model.use_ema():
        assert ema_model.state_dict()["averages"].keys() == dict(model.named_parameters()).keys()


def test_each_is_saved_in_a_file_of_its_own(model, tmp_path):
    ema_model = EMAModel(model, DECAYS)
    for _ in range(3):
        step(model)
        ema_model.update()
    loaded = EMAModel(another(), DECAYS)
    single = EMAModel(another(), DECAYS["long"])
    for name in DECAYS:
        loaded.load(ema_model.save(tmp_path / f"{name}.safetensors", name=name), name=name)
    single.load(tmp_path / "long.safetensors")
    for name in DECAYS:
        assert_same(loaded.averaged_parameters(name), ema_model.averaged_parameters(name))
    assert_same(single.averaged_parameters(), ema_model.averaged_parameters("long"))
    assert loaded.step == single.step == 3
    with pytest.warns(ema.EMAWarning, match="made with"):
        loaded.load(tmp_path / "long.safetensors", name="short")
    other = nn.ModuleDict({"first": nn.Linear(4, 8)})
    before = {k: v.clone() for k, v in ema_model.averaged_parameters("short").items()}
    with pytest.raises(CheckpointError, match=r"another model: missing: `norm.weight`"):
        ema_model.load(EMAModel(other, 0.5).save(tmp_path / "other.safetensors"), name="short")
    assert_same(ema_model.averaged_parameters("short"), before)
    with pytest.raises(ArgumentError, match="`name` must be one of"):
        ema_model.save(tmp_path / "all.safetensors")
