"""``use_ema(assign=True)``: parameters refer to the averages, and no byte moves."""

import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ema.torch_backend import EMACallback, EMAModel
from ema.torch_backend.tensors.memory import SMALL

SIDE = 80
assert SIDE**2 > SMALL


class Copies(TorchDispatchMode):
    """Counts the elements that are copied."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def averaged(model, **options):
    """An average half way between the model and one that is 2 further on."""
    ema_model = EMAModel(model, 0.5, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(2)
    ema_model.update()
    return ema_model


def copies(values):
    return {name: tensor.detach().clone() for name, tensor in values}


def test_no_value_is_copied():
    """What is too small for an allocation of its own is, so that saving the model stays small."""
    model = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE))
    ema_model = averaged(model)
    with Copies() as counted:
        ema_model.apply_ema(assign=True)
        ema_model.restore_original()
    assert counted.elements == 2 * SIDE  # the biases
    with Copies() as counted, ema_model.use_ema():
        pass
    assert counted.elements == 6 * 2 * (SIDE**2 + SIDE)


def test_the_parameter_is_the_average_itself():
    model = nn.Linear(SIDE, SIDE)
    ema_model = averaged(model)
    averages = ema_model.averaged_parameters()
    with ema_model.use_ema(assign=True):
        assert model.weight.data_ptr() == averages["weight"].data_ptr()
        saved = io.BytesIO()
        torch.save(model.state_dict(), saved)
        assert saved.getbuffer().nbytes < 1.2 * 4 * (SIDE**2 + SIDE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"compensated": True}])
def test_other_dtypes(dtype, options):
    """The parameter keeps its dtype; the average is rounded for it."""
    model = nn.Linear(SIDE, SIDE, dtype=dtype)
    ema_model = averaged(model, **options)
    live = copies(model.named_parameters())
    averages = copies(ema_model.averaged_parameters().items())
    with ema_model.use_ema(assign=True):
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype
            assert torch.equal(parameter, averages[name].to(dtype))
    assert all(torch.equal(p, live[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_on_one_storage_are_exchanged(dtype):
    """Two Parameter objects, or a parameter and a buffer, that are the same weights: both see it."""
    model = nn.ModuleList([nn.Linear(SIDE, SIDE, bias=False, dtype=dtype) for _ in range(3)])
    model[1].weight = nn.Parameter(model[0].weight.detach())
    model.register_buffer("alias", model[0].weight.detach())
    ema_model = averaged(model)
    live = copies(model.named_parameters())
    averages = copies(ema_model.averaged_parameters().items())
    with ema_model.use_ema(assign=True):
        for tensor in (model[0].weight, model[1].weight, model.alias):
            assert torch.equal(tensor, averages["0.weight"].to(dtype))
        assert torch.equal(model[2].weight, averages["2.weight"].to(dtype))
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr() == model.alias.data_ptr()
    assert all(torch.equal(p, live[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.bfloat16, nn.Module.share_memory])
def test_a_model_that_is_changed_in_the_block(change):
    """Cast it keeps its new dtype and gets the live values; the average stays what it was."""
    model = nn.Linear(SIDE, SIDE)
    ema_model = averaged(model)
    live, averages = (
        copies(model.named_parameters()),
        copies(ema_model.averaged_parameters().items()),
    )
    with ema_model.use_ema(assign=True):
        change(model)
        dtype = model.weight.dtype
    assert model.weight.dtype == dtype
    assert all(torch.equal(p, live[name].to(dtype)) for name, p in model.named_parameters())
    after = ema_model.averaged_parameters()
    assert all(torch.equal(after[name], averages[name]) for name in averages)
    ema_model.update()


def test_parameters_that_are_replaced_in_the_block_stay_replaced():
    model = nn.Linear(SIDE, SIDE)
    ema_model = averaged(model)
    averages = copies(ema_model.averaged_parameters().items())
    with ema_model.use_ema(assign=True):
        model.weight = nn.Parameter(torch.full((SIDE, SIDE), 7.0))
    assert bool((model.weight == 7).all())
    after = ema_model.averaged_parameters()
    assert all(torch.equal(after[name], averages[name]) for name in averages)


def test_training_goes_on_as_if_nothing_had_been(small, train):
    """Updates, optimizer and gradients meet the parameters where they were."""
    plain, swapped = small(), small()
    ours, theirs = EMAModel(plain, 0.9), EMAModel(swapped, 0.9)
    for model, ema_model, assign in ((plain, ours, None), (swapped, theirs, True)):
        for _ in train(model, steps=6):
            ema_model.update()
            if assign:
                with ema_model.use_ema(assign=True), torch.no_grad():
                    model(torch.ones(1, SIDE))
    assert all(map(torch.equal, plain.parameters(), swapped.parameters()))
    averages = theirs.averaged_parameters()
    assert all(torch.equal(a, averages[n]) for n, a in ours.averaged_parameters().items())


@pytest.fixture
def small():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(SIDE, SIDE), nn.ReLU(), nn.Linear(SIDE, 1))

    return make


@pytest.fixture
def train():
    def steps(model, steps):
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(steps):
            model(torch.randn(4, SIDE, generator=generator)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return steps


def test_backward_through_weights_that_an_assignment_has_touched_is_loud():
    """The graph has saved the parameter itself, which holds other values by now."""
    model = nn.Linear(SIDE, SIDE)
    ema_model = averaged(model)
    inputs = torch.ones(SIDE, SIDE, requires_grad=True)
    outside = (inputs * model.weight).sum()
    with ema_model.use_ema(assign=True):
        inside = (inputs * model.weight).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outside.backward(retain_graph=True)
        inside.backward(retain_graph=True)
    for loss in (inside, outside):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.slow
def test_a_compiled_model_sees_it_and_is_not_compiled_again(small):
    model = small()
    ema_model = averaged(model)
    inputs = torch.ones(2, SIDE)
    compiled = torch.compile(model)
    with torch.no_grad():
        live = compiled(inputs)
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(2):
                with ema_model.use_ema(assign=True):
                    inside, expected = compiled(inputs), ema_model(inputs)
                torch.testing.assert_close(inside, expected)
                assert not torch.allclose(inside, live)
                assert torch.equal(compiled(inputs), live)


def test_the_callback_passes_it_on():
    model = nn.Linear(SIDE, SIDE)
    callback = EMACallback(decay=0.5)
    callback.load_ema_state(averaged(model).state_dict())
    address = model.weight.data_ptr()
    callback.apply_ema(model, assign=True)
    assert model.weight.data_ptr() != address
    callback.restore_original(model)
    with callback.use_ema(model, assign=True):
        assert model.weight.data_ptr() != address
    assert model.weight.data_ptr() == address
