"""What holds for any run, found by hypothesis."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ema
from ema.torch_backend import EMAModel

numbers = st.floats(-1e6, 1e6, width=32)
decays = st.one_of(
    st.floats(0, 1),
    st.builds(ema.HalfLife, steps=st.floats(1e-3, 1e6)),
    st.builds(ema.InverseGammaWarmup, decay=st.floats(0, 1)),
    st.builds(ema.PowerFunction, gamma=st.floats(0, 100)),
    st.builds(ema.DebiasedDecay, decay=st.floats(0, 0.999)),
    st.just(ema.UniformAverage()),
)


def average_of(values, decay, **options):
    """Feed a sequence of numbers through the average of one parameter."""
    parameter = nn.Parameter(torch.tensor([values[0]]))
    ema_model = EMAModel(nn.ParameterList([parameter]), decay, **options)
    for value in values[1:]:
        with torch.no_grad():
            parameter.fill_(value)
        ema_model.update()
    return ema_model


@settings(max_examples=200)
@given(st.lists(numbers, min_size=2, max_size=20), decays)
def test_an_average_lies_between_the_extremes_of_what_it_averaged(values, decay):
    average = average_of(values, decay).averaged_parameters()["0"].item()
    slack = 4e-7 * max(map(abs, values)) * len(values)
    assert min(values) - slack <= average <= max(values) + slack


@settings(max_examples=100)
@given(numbers, st.integers(1, 30), decays)
def test_a_constant_stays_constant(value, steps, decay):
    average = average_of([value] * (steps + 1), decay).averaged_parameters()["0"]
    assert torch.equal(average, torch.tensor([value]))


@settings(max_examples=100)
@given(
    st.lists(numbers, min_size=3, max_size=20),
    decays,
    st.integers(0, 5),
    st.integers(1, 4),
    st.data(),
)
def test_splitting_a_run_and_resuming_changes_nothing(values, decay, after, every, data):
    options = {"update_after_step": after, "update_every": every}
    whole = average_of(values, decay, **options)
    cut = data.draw(st.integers(1, len(values) - 1))
    first = average_of(values[: cut + 1], decay, **options)
    parameter = nn.Parameter(torch.tensor([values[cut]]))
    second = EMAModel(nn.ParameterList([parameter]), decay, **options)
    second.load_state_dict(first.state_dict())
    for value in values[cut + 1 :]:
        with torch.no_grad():
            parameter.fill_(value)
        second.update()
    assert torch.equal(second.averaged_parameters()["0"], whole.averaged_parameters()["0"])
