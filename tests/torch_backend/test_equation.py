"""The page with the equations: each of them on its own, against float64."""

import pytest
import torch

from ema.rounding import stream_of
from ema.torch_backend.calls import run
from ema.torch_backend.tensors.sharding import box_of
from ema.torch_backend.update.equation import compensated, lerp, narrow
from ema.torch_backend.update.rounding import Indices, Scratch, StretchBits

WEIGHTS = [1e-9, 1e-3, 0.25, 0.49, 0.5, 0.75, 0.999]


@pytest.fixture
def numbers():
    """An average and params, of values that float32 holds."""
    return torch.randn(64), torch.randn(64)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_lerp_moves_the_average_by_the_weight(numbers, weight):
    average, params = numbers
    exact = average.double() + weight * (params.double() - average.double())
    run(lerp([average], [params], weight))
    assert torch.allclose(average.double(), exact, rtol=0, atol=2e-7)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_compensated_average_and_its_remainder_lose_nothing(numbers, weight):
    average, params = numbers
    remainder = torch.randn(64) * 1e-3  # larger than any real one, so that its part is seen
    before = average.double() + remainder.double()
    exact = before + weight * (params.double() - before)
    run(compensated(average, remainder, params, weight, (torch.empty(64), torch.empty(64))))
    size = weight * (params.double() - before).abs().max() + 1e-3
    assert ((average.double() + remainder.double() - exact).abs() <= 2e-7 * size).all()
    assert (remainder.abs() <= 2.0**-23 * average.abs() + 1e-12).all()


@pytest.mark.parametrize("bits", ["by chance", "to nearest"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_narrow_average_is_rounded_to_a_neighbor(numbers, weight, bits):
    average, params = numbers
    average = average.bfloat16()
    exact = average.double() + weight * (params.double() - average.double())
    chosen = None
    if bits == "by chance":
        chosen = StretchBits(stream_of("w", 0), Indices.of(average, box_of(average)), 0)
    scratch = Scratch.allocate(64, average.device)
    run(narrow(average, params, weight, count=1, bits=chosen, scratch=scratch))
    limit = 2.0**-7 if bits == "by chance" else 2.0**-8
    assert ((average.double() - exact).abs() <= limit * exact.abs() + 1e-6).all()


def of_all_kinds(average, params, weight):
    """The results of each equation, as float64."""
    rest = torch.full((64,), 1e-8)
    plain, exact, small = average.clone(), average.clone(), average.bfloat16()
    run(lerp([plain], [params], weight))
    run(compensated(exact, rest, params, weight, (torch.empty(64), torch.empty(64))))
    scratch = Scratch.allocate(64, average.device)
    bits = StretchBits(stream_of("w", 0), Indices.of(small, box_of(small)), 0)
    run(narrow(small, params, weight, count=1, bits=bits, scratch=scratch))
    return plain, exact, rest, small


def test_a_weight_of_zero_leaves_everything(numbers):
    average, params = numbers
    plain, exact, rest, small = of_all_kinds(average, params, 0.0)
    assert torch.equal(plain, average)
    assert torch.equal(exact, average)
    assert (rest == 1e-8).all()
    assert torch.equal(small, average.bfloat16())


def test_a_weight_of_one_copies_infinities_too(numbers):
    average, params = numbers
    average[0], params[0], average[1], params[1] = torch.inf, torch.inf, torch.inf, 0.0
    plain, exact, rest, small = of_all_kinds(average, params, 1.0)
    assert torch.equal(plain, params)
    assert torch.equal(exact, params)
    assert (rest == 0.0).all()
    assert torch.equal(small, params.bfloat16())
