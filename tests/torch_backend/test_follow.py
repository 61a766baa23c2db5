"""The model changes underneath: it is followed, or refused with nothing changed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ema import ModelError, StateError
from ema.torch_backend import EMAModel
from ema.torch_backend.tensors import layouts
from tests.torch_helpers import another, step, values


def check_follows(model, ema_model, names, step):
    """The next updates average the tensors that the model has now."""
    for _ in range(2):
        before = {n: a.clone() for n, a in ema_model.averaged_parameters().items()}
        step(model)
        ema_model.update()
        live = dict(model.named_parameters())
        for name in names:
            target = live[name].detach().to(before[name].dtype)
            expected = before[name].lerp(target, 0.5)
            assert torch.equal(ema_model.averaged_parameters()[name], expected)


def replace_parameter(model):
    model.first.weight = nn.Parameter(torch.randn(8, 4))


def replace_module(model):
    model.first = nn.Linear(4, 8)


def replace_data(model):
    model.first.weight.data = torch.randn(8, 4)


def replace_vector(model):
    model.first.bias.data = torch.randn(8)


def load_with_assign(model):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def cast(model):
    model.to(torch.bfloat16)


def cast_and_back(model):
    model.half().float()


def cast_wider(model):
    model.double()


def change_layout(model):
    model.first.weight.data = model.first.weight.data.t().contiguous().t()


def transpose_in_place(model):
    model.second.weight = nn.Parameter(torch.randn(8, 2).t())


def every_second_element_at_the_same_address(model):
    memory = torch.randn(16)
    model.first.bias.data = memory[:8]
    model.first.bias.data = memory[::2]


def other_dtype_at_the_same_address(model):
    memory = torch.ones(8, 8)
    model.first.weight.data = memory[:, :4].contiguous()
    model.first.weight.data = model.first.weight.data.view(torch.float16)[:, ::2]


@pytest.mark.parametrize(
    "change",
    [
        replace_parameter,
        replace_module,
        replace_data,
        replace_vector,
        load_with_assign,
        cast,
        cast_and_back,
        cast_wider,
        change_layout,
        transpose_in_place,
        every_second_element_at_the_same_address,
        other_dtype_at_the_same_address,
    ],
)
def test_followed(model, change):
    """Replaced, reloaded, cast or laid out anew: the tensors that are there now are averaged."""
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    change(model)
    check_follows(model, ema_model, set(ema_model.averaged_parameters()), step)


def test_a_cast_model_keeps_its_average_in_float32(model):
    ema_model = EMAModel(model, 0.5)
    model.to(torch.bfloat16)
    step(model)
    ema_model.update()
    assert {a.dtype for a in ema_model.averaged_parameters().values()} == {torch.float32}


def test_an_average_never_gets_narrower(model):
    ema_model = EMAModel(model, 0.5)
    model.double()
    step(model)
    ema_model.update()
    model.float()
    step(model)
    ema_model.update()
    assert {a.dtype for a in ema_model.averaged_parameters().values()} == {torch.float64}


def test_an_unfrozen_parameter_joins_with_its_value(model):
    model.first.requires_grad_(requires_grad=False)
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    model.first.requires_grad_(requires_grad=True)
    step(model)
    live = model.first.weight.detach().clone()
    ema_model.update()
    assert torch.equal(ema_model.averaged_parameters()["first.weight"], live)
    check_follows(model, ema_model, ["first.weight", "second.weight"], step)


def test_once_averaged_always_averaged(model):
    """A GAN freezes and thaws: the average of a frozen parameter goes on."""
    ema_model = EMAModel(model, 0.5)
    model.first.requires_grad_(requires_grad=False)
    check_follows(model, ema_model, ["first.weight"], step)
    model.extra = nn.Linear(2, 2)
    ema_model.update()
    assert "first.weight" in ema_model.averaged_parameters()


def test_a_module_added_later_joins(model):
    ema_model = EMAModel(model, 0.5)
    model.norm.extra = nn.Linear(2, 2)
    ema_model.update()
    assert torch.equal(
        ema_model.averaged_parameters()["norm.extra.weight"], model.norm.extra.weight
    )
    check_follows(model, ema_model, ["norm.extra.weight"], step)


def resize_matrix(model):
    model.first.weight = nn.Parameter(torch.randn(8, 5))


def resize_vector(model):
    model.first.bias.data = model.first.bias.data[:4]


def shrink_in_place(model):
    model.first.weight.data = model.first.weight.data.resize_(4, 4)


def grow_in_place(model):
    model.first.bias.data = model.first.bias.data.resize_(1000)


def reshape(model):
    model.first.weight.data = model.first.weight.data.view(4, 8)


def remove(model):
    del model.first.bias
    model.first.register_parameter("bias", None)


def remove_module(model):
    model.first = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [
        resize_matrix,
        resize_vector,
        shrink_in_place,
        grow_in_place,
        reshape,
        remove,
        remove_module,
    ],
)
def test_refused_with_the_name_and_nothing_changed(model, change):
    """A parameter that was resized or removed: the update refuses before it does anything."""
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    before = {n: a.clone() for n, a in ema_model.averaged_parameters().items()}
    averages = dict(ema_model.averaged_parameters())
    change(model)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"`first\.(weight|bias)`"):
            ema_model.update()
    assert (ema_model.step, ema_model.count) == (1, 1)
    assert all(torch.equal(before[name], averages[name]) for name in before)


def test_a_shape_that_comes_back_is_followed_again(model):
    ema_model = EMAModel(model, 0.5)
    weight = model.first.weight
    model.first.weight = nn.Parameter(torch.randn(1, 1))
    with pytest.raises(ModelError, match="shape"):
        ema_model.update()
    model.first.weight = weight
    check_follows(model, ema_model, ["first.weight"], step)


def test_weights_loaded_in_place_are_averaged_from_the_next_update(model):
    ema_model = EMAModel(model, 0.5)
    before = ema_model.averaged_parameters()["first.weight"].clone()
    model.load_state_dict(another().state_dict())
    ema_model.update()
    expected = before.lerp(model.first.weight.detach(), 0.5)
    assert torch.equal(ema_model.averaged_parameters()["first.weight"], expected)


def test_a_model_moved_while_averages_are_in_gets_its_weights_back(model):
    """model.half() inside the block: the live weights come back, in half."""
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    live = values(model)
    averages = {n: a.clone() for n, a in ema_model.averaged_parameters().items()}
    with ema_model.use_ema():
        model.half()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, live[name].half())
        assert torch.equal(ema_model.averaged_parameters()[name], averages[name])


class TestSmallVectors:
    """They are gathered through the parameters themselves, so that little is left to look at."""

    @pytest.fixture
    def vectors(self):
        return nn.ParameterList([nn.Parameter(torch.zeros(256)) for _ in range(5)])

    def test_are_read_wherever_their_memory_is(self, vectors):
        ema_model = EMAModel(vectors, decay=0.75)
        vectors[1].data = torch.ones(256)
        vectors[2].data = torch.ones(512)[::2]
        ema_model.update()
        values = [a.unique().item() for a in ema_model.averaged_parameters().values()]
        assert values == [0, 0.25, 0.25, 0, 0]

    def test_that_are_cast_have_a_wider_average(self, vectors):
        ema_model = EMAModel(vectors, decay=0.75)
        vectors[1].data = vectors[1].data.double()
        ema_model.update()
        assert ema_model.averaged_parameters()["1"].dtype == torch.float64

    def test_that_are_resized_are_refused(self, vectors):
        ema_model = EMAModel(vectors, decay=0.75)
        before = ema_model.state_dict()
        vectors[4].data = torch.ones(10)
        with pytest.raises(ModelError, match=r"`4` has shape \(10,\)"):
            ema_model.update()
        assert ema_model.step == 0
        assert torch.equal(ema_model._averages.held(0)["0"], before["averages"]["0"])


def test_vectors_cast_to_a_dtype_of_the_same_size_are_followed():
    """Numbers that float16 does not hold are read as they are."""
    model = nn.LayerNorm(8).half()
    ema_model = EMAModel(model, 0.5)
    model.bfloat16()
    with torch.no_grad():
        model.weight.fill_(2.0**20)
    ema_model.update()
    assert torch.equal(ema_model.averaged_parameters()["weight"], torch.full((8,), 0.5 + 2.0**19))


def vectors(**given):
    """A module with these parameters."""
    model = nn.Module()
    for name, tensor in given.items():
        model.register_parameter(name, nn.Parameter(tensor))
    return model


def at_the_same_address(tensor, change):
    """Another view of the memory of a parameter, which the parameter refers to from now on."""
    address = tensor.data_ptr()
    tensor.data = change(tensor.data)
    assert tensor.data_ptr() == address


@pytest.mark.parametrize(
    ("size", "change"),
    [
        (8, lambda data: data.view(2, 4)),
        (8, lambda data: data.view(8, 1)),
        (8, lambda data: data.view(torch.float64)),
        (8, lambda data: data.view(torch.bfloat16)),
        (20_000, lambda data: data.view(200, 100)),
        (20_000, lambda data: data[:10_000]),
        (20_000, lambda data: data.view(torch.complex64)),
    ],
)
def test_another_shape_at_the_same_address_is_refused_with_nothing_changed(size, change):
    """Also where it has the same number of bytes; small and large tensors, and those before it."""
    model = vectors(
        a=torch.zeros(8), b=torch.zeros(8).bfloat16(), c=torch.zeros(size), d=torch.zeros(8)
    )
    average = EMAModel(model, 0.5, on_nonfinite="skip")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    before = average.state_dict()
    kept = model.c.data
    at_the_same_address(model.c, change)
    with pytest.raises(ModelError, match=r"the model has changed: `c` has shape"):
        average.update()
    model.c.data = kept
    after = average.state_dict()
    assert (after["step"], after["count"], after["skipped"]) == (0, 0, 0)
    for name, tensor in before["averages"].items():
        assert torch.equal(tensor, after["averages"][name])
    average.update()
    assert all(bool((a == 0.5).all()) for a in average.averaged_parameters().values())


@pytest.mark.parametrize("size", [10, 10_000])
def test_other_strides_at_the_same_address_are_followed(size):
    memory = torch.arange(2.0 * size)
    model = vectors(w=memory[:size])
    average = EMAModel(model, 0.0)
    at_the_same_address(model.w, lambda _: memory[::2])
    average.update()
    assert torch.equal(average.averaged_parameters()["w"], memory[::2])


@pytest.mark.parametrize("size", [10, 10_000])
def test_another_dtype_at_the_same_address_is_followed(size):
    """The two halves of a precision have as many bytes."""
    model = vectors(w=torch.ones(size).bfloat16(), v=torch.ones(3).bfloat16())
    average = EMAModel(model, 0.0)
    at_the_same_address(model.w, lambda data: data.view(torch.float16))
    average.update()
    assert torch.equal(average.averaged_parameters()["w"], model.w.detach().float())
    assert (average.averaged_parameters()["w"] == 1.875).all()


def watched(average):
    return average._averages._bound


@pytest.mark.parametrize(
    "inside",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autograd.set_detect_anomaly(mode=True, check_nan=False),
    ],
)
def test_a_mode_is_no_change_of_the_model(model, inside):
    """What is prepared for an update is kept, whatever mode the update is made in."""
    average = EMAModel(model, 0.5)
    average.update()
    prepared = watched(average)
    for _ in range(2):
        step(model)
        with inside():
            average.update()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    average.update()
    assert watched(average) is prepared


def test_without_the_guards_of_compiled_code_the_same_is_noticed(model, monkeypatch):
    monkeypatch.setattr(layouts, "TensorGuards", None)
    average = EMAModel(model, 0.5)
    prepared = watched(average)
    average.update()
    assert watched(average) is prepared
    at_the_same_address(model.first.bias, lambda data: data.view(2, 4))
    with pytest.raises(ModelError, match=r"`first.bias` has shape \(2, 4\)"):
        average.update()


def linear(value):
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    return layer


def means(average):
    return {name: value.mean().item() for name, value in average.averaged_parameters().items()}


def test_layers_that_move_on_take_their_averages_along():
    """A layer in front of others shifts their names; it joins with its own values."""
    model = nn.Sequential(linear(1.0), linear(2.0))
    average = EMAModel(model, 0.5)
    model.insert(0, linear(7.0))
    for layer in model[1:]:
        with torch.no_grad():
            layer.weight.add_(1)
            layer.bias.add_(1)
    average.update()
    assert means(average) == {
        "0.weight": 7.0,
        "0.bias": 7.0,
        "1.weight": 1.5,
        "1.bias": 1.5,
        "2.weight": 2.5,
        "2.bias": 2.5,
    }


def test_layers_that_change_places_take_their_averages_along():
    model = nn.Sequential(linear(1.0), linear(2.0), linear(3.0))
    average = EMAModel(model, 1.0, compensated=True)
    model[0], model[2] = model[2], model[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    assert means(average)["0.weight"] == 3.0  # also when only looked at
    average.update()
    assert [means(average)[f"{index}.bias"] for index in range(3)] == [3.0, 2.0, 1.0]
    with average.use_ema():
        assert [layer.bias[0].item() for layer in model] == [3.0, 2.0, 1.0]


def test_a_frozen_layer_that_moves_on_keeps_its_average():
    model = nn.Sequential(linear(1.0), linear(2.0))
    average = EMAModel(model, 1.0)
    model[0].requires_grad_(False)
    model.insert(0, linear(5.0).requires_grad_(False))
    average.update()
    assert means(average) == {"1.weight": 1.0, "1.bias": 1.0, "2.weight": 2.0, "2.bias": 2.0}


def test_the_last_parameter_under_a_new_name_is_followed():
    """Nothing but the name tells: the modules hold the same tensors in the same order."""
    model = vectors(a=torch.zeros(4), b=torch.ones(4))
    average = EMAModel(model, 1.0)
    model.c = model.b
    del model.b
    average.update()
    assert means(average) == {"a": 0.0, "c": 1.0}


def test_a_layer_that_was_removed_is_refused_even_if_another_has_its_name():
    model = nn.Sequential(linear(1.0), linear(2.0))
    average = EMAModel(model, 0.5)
    del model[0]
    text = "`0.weight` is now the tensor that was called `1.weight`, its own is gone"
    with pytest.raises(ModelError, match=text):
        average.update()
    assert average.step == 0


def test_a_parameter_under_a_new_name_and_with_other_values_is_refused():
    """A parametrization may keep a weight in another form in the same ``Parameter``."""

    class Exponential(nn.Module):
        def forward(self, x):
            return x.exp()

        def right_inverse(self, x):
            return x.log()

    model = nn.Sequential(linear(1.0))
    average = EMAModel(model, 0.5)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Exponential())
    text = r"`0.parametrizations.weight.original` was called `0.weight` and lies in other memory"
    with pytest.raises(ModelError, match=text):
        average.update()
    assert average.step == 0


def test_a_pruned_weight_is_followed_under_its_new_name():
    model = nn.Sequential(linear(1.0))
    average = EMAModel(model, 1.0)
    prune.random_unstructured(model[0], "weight", 0.5)
    average.update()
    assert means(average) == {"0.weight_orig": 1.0, "0.bias": 1.0}


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("bad", ["bias", "weight"])
def test_a_newcomer_does_not_join_in_an_update_that_is_not_made(on_nonfinite, bad):
    """It would keep a NaN for good, and a refused update changes nothing."""
    model = linear(1.0)
    model.bias.requires_grad_(False)
    average = EMAModel(model, 0.5, on_nonfinite=on_nonfinite)
    average.update()
    model.bias.requires_grad_(True)
    with torch.no_grad():
        getattr(model, bad).fill_(torch.nan)
    if on_nonfinite == "raise":
        with pytest.raises(StateError, match=f"got `{bad}`"):
            average.update()
    else:
        average.update()
    assert (average.count, average.skipped) == (1, int(on_nonfinite == "skip"))
    assert means(average) == {"weight": 1.0}
    with torch.no_grad():
        getattr(model, bad).fill_(1.0)
    average.update()
    assert means(average) == {"weight": 1.0, "bias": 1.0}


def test_a_newcomer_that_holds_nan_waits_also_between_updates():
    model = linear(1.0)
    model.bias.requires_grad_(False)
    average = EMAModel(model, 0.5, update_every=2, on_nonfinite="skip")
    model.bias.requires_grad_(True)
    with torch.no_grad():
        model.bias.fill_(torch.nan)
    average.update()
    with torch.no_grad():
        model.bias.fill_(3.0)
    average.update()
    assert means(average) == {"weight": 1.0, "bias": 3.0}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_tie_by_memory_that_is_parted_is_noticed(frozen):
    """Two parameters in one memory are one average; with memory of its own the second one joins."""
    model = vectors(a=torch.zeros(3))
    model.b = nn.Parameter(model.a.data)
    model.requires_grad_(not frozen)
    average = EMAModel(model, 0.5, include="*")
    assert means(average).keys() == {"a"}
    model.a.data = torch.ones(3)
    average.update()
    assert means(average) == {"a": 0.5, "b": 0.0}


def test_an_included_parameter_that_a_state_lacks_joins_at_the_next_update():
    model = linear(1.0)
    model.bias.requires_grad_(False)
    state = EMAModel(model, 0.5).state_dict()
    average = EMAModel(model, 0.5, include="*")
    average.load_state_dict(state)
    assert means(average) == {"weight": 1.0}
    average.update()
    assert means(average) == {"weight": 1.0, "bias": 1.0}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_averages_are_as_wide_as_these(again):
    """An average never gets narrower: here its model was of float64 once."""
    model = nn.Linear(2, 2).double()
    average = EMAModel(model, 0.5)
    model.float()
    average.update()
    assert again((model, average))[1].averaged_parameters()["bias"].dtype == torch.float64


def test_several_averages_go_on_one_file_after_the_other(tmp_path):
    """Also in a new object that does not average what the files hold: it was frozen since."""
    model = linear(1.0)
    decays = {"a": 0.5, "b": 0.9}
    average = EMAModel(model, decays, compensated=True)
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    average.update()
    files = {name: average.save(tmp_path / name, name=name) for name in decays}
    again = EMAModel(model, decays, compensated=True)
    for name, file in files.items():
        again.load(file, name=name)
        for key, value in average.averaged_parameters(name).items():
            assert torch.equal(again.averaged_parameters(name)[key], value)
    assert again.averaged_parameters("a").keys() == {"weight", "bias"}
