"""The model changes underneath: it is followed, or refused with nothing changed."""

import copy

import pytest
import torch
from torch import nn

from ema import ModelError
from ema.torch_backend import EMAModel


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
    ],
)
def test_followed(model, step, change):
    """Replaced, reloaded, cast or laid out anew: the tensors that are there now are averaged."""
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    change(model)
    check_follows(model, ema_model, set(ema_model.averaged_parameters()), step)


def test_a_cast_model_keeps_its_average_in_float32(model, step):
    ema_model = EMAModel(model, 0.5)
    model.to(torch.bfloat16)
    step(model)
    ema_model.update()
    assert {a.dtype for a in ema_model.averaged_parameters().values()} == {torch.float32}


def test_an_average_never_gets_narrower(model, step):
    ema_model = EMAModel(model, 0.5)
    model.double()
    step(model)
    ema_model.update()
    model.float()
    step(model)
    ema_model.update()
    assert {a.dtype for a in ema_model.averaged_parameters().values()} == {torch.float64}


def test_an_unfrozen_parameter_joins_with_its_value(model, step):
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


def test_once_averaged_always_averaged(model, step):
    """A GAN freezes and thaws: the average of a frozen parameter goes on."""
    ema_model = EMAModel(model, 0.5)
    model.first.requires_grad_(requires_grad=False)
    check_follows(model, ema_model, ["first.weight"], step)
    model.extra = nn.Linear(2, 2)
    ema_model.update()
    assert "first.weight" in ema_model.averaged_parameters()


def test_a_module_added_later_joins(model, step):
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
def test_refused_with_the_name_and_nothing_changed(model, step, change):
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


def test_a_shape_that_comes_back_is_followed_again(model, step):
    ema_model = EMAModel(model, 0.5)
    weight = model.first.weight
    model.first.weight = nn.Parameter(torch.randn(1, 1))
    with pytest.raises(ModelError, match="shape"):
        ema_model.update()
    model.first.weight = weight
    check_follows(model, ema_model, ["first.weight"], step)


def test_weights_loaded_in_place_are_averaged_from_the_next_update(model, step, another):
    ema_model = EMAModel(model, 0.5)
    before = ema_model.averaged_parameters()["first.weight"].clone()
    model.load_state_dict(another().state_dict())
    ema_model.update()
    expected = before.lerp(model.first.weight.detach(), 0.5)
    assert torch.equal(ema_model.averaged_parameters()["first.weight"], expected)


def test_a_model_moved_while_averages_are_in_gets_its_weights_back(model, step, values):
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
        assert all(map(torch.equal, ema_model._average.held()["0"], [before["averages"]["0"]]))


def test_vectors_cast_to_a_dtype_of_the_same_size_are_followed():
    """Numbers that float16 does not hold are read as they are."""
    model = nn.LayerNorm(8).half()
    ema_model = EMAModel(model, 0.5)
    model.bfloat16()
    with torch.no_grad():
        model.weight.fill_(2.0**20)
    ema_model.update()
    assert torch.equal(ema_model.averaged_parameters()["weight"], torch.full((8,), 0.5 + 2.0**19))
