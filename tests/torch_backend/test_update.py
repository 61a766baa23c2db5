"""The equation: every kind of tensor is averaged right, and in place."""

import numpy as np
import pytest
import torch
from torch import nn

import ema
from ema.torch_backend import EMAModel
from ema.torch_backend.tensors.memory import CHUNK, SMALL
from tests import frames
from tests.torch_helpers import assert_same, step, values


def train(model, ema_model, step, steps):
    """Yield the live parameters after each of ``steps`` steps with an update."""
    for _ in range(steps):
        step(model)
        ema_model.update()
        yield {name: p.detach().clone() for name, p in model.named_parameters()}


def test_equals_lerp_bit_for_bit(model):
    """The average is what Tensor.lerp_ gives with the weight 1 − decay."""
    expected = values(model)
    ema_model = EMAModel(model, decay=0.9)
    for live in train(model, ema_model, step, 20):
        for name in expected:
            expected[name].lerp_(live[name], 1 - 0.9)
    assert_same(ema_model.averaged_parameters(), expected)


@pytest.mark.parametrize("weight", [0.001, 0.3, 0.5, 0.9])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64]
)
@pytest.mark.parametrize("size", [7, SMALL, SMALL + 1, CHUNK + 3])
def test_equation_for_every_dtype_and_size(dtype, size, weight):
    """Small, large and chunked tensors follow the equation in float32 or wider."""
    parameter = nn.Parameter(torch.randn(size, dtype=dtype))
    module = nn.ParameterList([parameter])
    before = parameter.detach().to(torch.promote_types(dtype, torch.float32), copy=True)
    ema_model = EMAModel(module, decay=1 - weight)
    with torch.no_grad():
        parameter.copy_(torch.randn(size, dtype=dtype))
    ema_model.update()
    (average,) = ema_model.averaged_parameters().values()
    assert average.dtype == before.dtype
    target = parameter.detach().to(before.dtype)
    if dtype.is_complex:
        before, target, average = map(torch.view_as_real, (before, target, average))
    expected = before.lerp(target, 1 - (1 - weight))
    assert torch.equal(average, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(70, 80).t(),
        lambda: torch.randn(70, 80)[:, ::2],
        lambda: torch.randn(3, 2000, 2)[..., 1],
        lambda: torch.randn(()),
        lambda: torch.randn(0, 3),
        lambda: torch.randn(6, 4, dtype=torch.complex64).t(),
        lambda: torch.randn(6, 4, dtype=torch.complex64)[:, :3],
    ],
    ids=["channels-last", "transposed", "slice", "plane", "scalar", "empty", "c-t", "c-slice"],
)
@pytest.mark.parametrize("half", [False, True])
def test_every_memory_layout(make, half):
    """Strides are kept where memory is dense, and the values are right everywhere."""
    tensor = make()
    if half and not tensor.is_complex():
        tensor = tensor.bfloat16()
    parameter = nn.Parameter(tensor)
    module = nn.ParameterList([parameter])
    ema_model = EMAModel(module, decay=0.75)
    expected = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
    for _ in range(3):
        with torch.no_grad():
            parameter.mul_(1.5).add_(1)
        expected = expected + 0.25 * (parameter.detach().to(expected.dtype) - expected)
        ema_model.update()
    (average,) = ema_model.averaged_parameters().values()
    torch.testing.assert_close(average, expected)
    if parameter.numel() and parameter.is_contiguous(memory_format=torch.preserve_format):
        assert average.stride() == parameter.stride()
    live = parameter.detach().clone()
    with ema_model.use_ema():
        torch.testing.assert_close(parameter.detach(), expected.to(parameter.dtype))
    assert torch.equal(parameter, live)


def test_accuracy_at_a_decay_near_one():
    """10 000 noisy updates at 0.9999 stay within 1e-5 of the float64 recursion."""
    rng = np.random.default_rng(0)
    parameter = nn.Parameter(torch.from_numpy(rng.normal(size=500).astype(np.float32)))
    ema_model = EMAModel(nn.ParameterList([parameter]), decay=0.9999)
    oracle = parameter.detach().numpy().astype(np.float64)
    center = oracle.copy()
    for _ in range(10_000):
        noisy = (center + rng.normal(size=500)).astype(np.float32)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(noisy))
        ema_model.update()
        oracle += (1 - 0.9999) * (noisy.astype(np.float64) - oracle)
    (average,) = ema_model.averaged_parameters().values()
    error = np.abs(average.numpy() - oracle).max() / np.abs(oracle).max()
    assert error <= 1e-5


def test_weight_one_copies_and_weight_zero_keeps_infinities():
    """Inf − Inf never happens at the ends of the range of weights."""
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    copying = EMAModel(nn.ParameterList([parameter]), decay=0.0)
    frozen = EMAModel(nn.ParameterList([parameter]), decay=1.0)
    with torch.no_grad():
        parameter.copy_(torch.tensor([torch.inf, -torch.inf]))
    for ema_model in (copying, frozen):
        ema_model.update()
        ema_model.update()
    assert copying.averaged_parameters()["0"].tolist() == [torch.inf, -torch.inf]
    assert frozen.averaged_parameters()["0"].tolist() == [1.0, 2.0]


def test_bfloat16_parameters_move_their_average():
    """At decay 0.999 the average of a bfloat16 parameter approaches a constant target."""
    parameter = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    ema_model = EMAModel(nn.ParameterList([parameter]), decay=0.999)
    with torch.no_grad():
        parameter.fill_(1.1)
    for _ in range(1000):
        ema_model.update()
    average = ema_model.averaged_parameters()["0"]
    target = parameter.detach().float()
    torch.testing.assert_close(average, 1 + (target - 1) * (1 - 0.999**1000), rtol=1e-5, atol=0)


def test_averages_can_be_float64(model):
    """dtype=torch.float64 averages float32 parameters in float64."""
    ema_model = EMAModel(model, decay=0.9999, dtype=torch.float64)
    oracle = {name: value.double() for name, value in values(model).items()}
    for live in train(model, ema_model, step, 50):
        for name, value in oracle.items():
            value.add_((1 - 0.9999) * (live[name].double() - value))
    for name, average in ema_model.averaged_parameters().items():
        torch.testing.assert_close(average, oracle[name], rtol=1e-14, atol=1e-14)


def test_update_every_makes_every_kth_update(model):
    """With update_every=3 the average moves at steps 3, 6, … by the weights of steps 3, 6, 9."""
    ema_model = EMAModel(model, decay=0.5, update_every=3)
    expected = values(model)
    for number, live in enumerate(train(model, ema_model, step, 8), start=1):
        if number % 3 == 0:
            for name in expected:
                expected[name].lerp_(live[name], 0.5)
        assert_same(ema_model.averaged_parameters(), expected)
    assert (ema_model.step, ema_model.count) == (8, 2)


def test_update_after_step_follows_the_live_weights_first(model):
    """Through step 5 the average is the live weights whenever it is read; updates count from it."""
    ema_model = EMAModel(model, decay=0.5, update_after_step=5, update_every=2)
    assert_same(ema_model.averaged_parameters(), values(model))
    expected = {}
    for number, live in enumerate(train(model, ema_model, step, 10), start=1):
        if number <= 5:
            expected = live
        elif number in (7, 9):
            expected = {name: expected[name].lerp(live[name], 0.5) for name in live}
        assert_same(ema_model.averaged_parameters(), expected)
    assert (ema_model.step, ema_model.count) == (10, 2)


def test_before_the_start_live_weights_changed_by_hand_are_the_average(model):
    """Until update_after_step the average is the live weights, also between two updates."""
    ema_model = EMAModel(model, update_after_step=10)
    ema_model.update()
    step(model)
    for name, average in ema_model.averaged_parameters().items():
        assert torch.equal(average, values(model)[name])
    with ema_model.use_ema():
        pass


def test_schedules_get_count_and_span(model):
    """A schedule is asked for the number of the update and the steps between two."""
    schedule = ema.HalfLifeRampup(steps=10, rampup_ratio=0.5)
    ema_model = EMAModel(model, schedule, update_every=2)
    expected = values(model)
    for number, live in enumerate(train(model, ema_model, step, 10), start=1):
        if number % 2 == 0:
            weight = np.float32(schedule.weight(number // 2, 2))
            for name in expected:
                expected[name].lerp_(live[name], float(weight))
    assert_same(ema_model.averaged_parameters(), expected)


def test_reset_starts_again(model):
    """reset() makes the average the live weights and counts from 0."""
    ema_model = EMAModel(model, 0.9)
    for _ in train(model, ema_model, step, 3):
        pass
    ema_model.reset()
    assert (ema_model.step, ema_model.count) == (0, 0)
    assert_same(ema_model.averaged_parameters(), values(model))
    step(model)
    assert not torch.equal(ema_model.averaged_parameters()["first.weight"], model.first.weight)


def test_works_across_inference_mode(model):
    """An average made or updated in inference mode can be used outside of it, and back."""
    with torch.inference_mode():
        ema_model = EMAModel(model, 0.5)
    expected = values(model)
    step(model)
    ema_model.update()
    expected = {name: expected[name].lerp(live, 0.5) for name, live in values(model).items()}
    with torch.inference_mode():
        ema_model.update()
        with ema_model.use_ema():
            pass
    expected = {name: expected[name].lerp(live, 0.5) for name, live in values(model).items()}
    with ema_model.use_ema():
        assert_same(values(model), expected)


def test_memory_is_one_copy_of_what_is_averaged(model):
    """Frozen parameters take none, and updates allocate nothing of the model's size."""
    model.first.requires_grad_(requires_grad=False)
    ema_model = EMAModel(model)
    averages = ema_model.averaged_parameters()
    assert averages.keys() == {"norm.weight", "norm.bias", "second.weight", "second.bias"}
    storages = {a.untyped_storage().data_ptr(): a.untyped_storage() for a in averages.values()}
    held = sum(storage.nbytes() for storage in storages.values())
    assert held == sum(a.numel() * 4 for a in averages.values())


@pytest.mark.parametrize("sizes", [[256] * 300, [SMALL - n % 100 for n in range(30)], [1] * 9])
def test_small_tensors_are_gathered_in_order(sizes):
    """However many pieces they are gathered in, an average is that of its own parameter."""
    model = nn.ParameterList(
        [nn.Parameter(torch.full((n,), float(i))) for i, n in enumerate(sizes)]
    )
    ema_model = EMAModel(model, 0.75)
    with torch.no_grad():
        for i, parameter in enumerate(model):
            parameter.copy_(i + 4 * torch.arange(len(parameter)))
    ema_model.update()
    for i, average in enumerate(ema_model.averaged_parameters().values()):
        assert torch.equal(average, i + torch.arange(len(average), dtype=torch.float32))


def test_the_way_of_an_update_through_the_code_stays_short():
    """Fewer functions and files than before the rooms: then there were 43 in 15 files."""
    found = frames.entered()
    assert 10 < len(found) <= 35
    assert len({code.co_filename for code in found}) <= 13
