"""The page with the equations: each of them on its own, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ema
from ema.jax_backend.update.equation import lerp, lerp_compensated, lerp_narrow, update_weight

WEIGHTS = [1e-9, 1e-3, 0.25, 0.49, 0.5, 0.75, 0.999]
KEY = 1234


@pytest.fixture
def numbers():
    """An average, its remainder and params; no real remainder is as large, so that it is seen."""
    rng = np.random.default_rng(0)
    average, remainder, params = (jnp.asarray(rng.normal(size=64), jnp.float32) for _ in range(3))
    return average, remainder * jnp.float32(1e-3), params


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_compensated_average_and_its_remainder_lose_nothing(numbers, weight):
    average, remainder, params = (np.asarray(each, np.float64) for each in numbers)
    before = average + remainder
    exact = before + weight * (params - before)
    moved, lost = lerp_compensated(*numbers, jnp.float32(weight))
    size = weight * np.abs(params - before).max() + 1e-3
    error = np.asarray(moved, np.float64) + np.asarray(lost, np.float64) - exact
    assert np.abs(error).max() <= 2e-7 * size
    assert (np.abs(lost) <= 2.0**-23 * np.abs(moved) + 1e-12).all()


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_complex_average_is_two_real_ones(numbers, weight):
    average, remainder, params = numbers
    there = tuple(jax.lax.complex(each, each[::-1]) for each in numbers)
    moved, lost = lerp_compensated(*there, jnp.float32(weight))
    real = lerp_compensated(average, remainder, params, jnp.float32(weight))
    imaginary = lerp_compensated(average[::-1], remainder[::-1], params[::-1], jnp.float32(weight))
    for both, one, other in zip((moved, lost), real, imaginary, strict=True):
        assert jnp.array_equal(jnp.real(both), one)
        assert jnp.array_equal(jnp.imag(both), other)


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_narrow_average_is_rounded_to_a_neighbor(numbers, weight, key):
    average, _, params = numbers
    average = average.astype(jnp.bfloat16)
    before = np.asarray(average.astype(jnp.float32), np.float64)
    exact = before + weight * (np.asarray(params, np.float64) - before)
    moved = lerp_narrow(average, params, jnp.float32(weight), key and jnp.uint32(key))
    limit = 2.0**-8 if key is None else 2.0**-7
    error = np.asarray(moved.astype(jnp.float32), np.float64) - exact
    assert (np.abs(error) <= limit * np.abs(exact) + 1e-6).all()


def of_all_kinds(average, remainder, params, weight):
    weight = jnp.float32(weight)
    narrow = lerp_narrow(average.astype(jnp.bfloat16), params, weight, jnp.uint32(KEY))
    return (
        lerp(average, params, weight),
        *lerp_compensated(average, remainder, params, weight),
        narrow,
    )


def test_a_weight_of_zero_leaves_everything(numbers):
    average, remainder, params = numbers
    plain, exact, rest, small = of_all_kinds(average, remainder, params, 0)
    assert jnp.array_equal(plain, average)
    assert jnp.array_equal(exact, average)
    assert jnp.array_equal(rest, remainder)
    assert jnp.array_equal(small, average.astype(jnp.bfloat16))


def test_a_weight_of_one_copies_infinities_too(numbers):
    average, remainder, params = numbers
    average = average.at[:2].set(jnp.inf)
    params = params.at[0].set(jnp.inf)
    plain, exact, rest, small = of_all_kinds(average, remainder, params, 1)
    assert jnp.array_equal(plain, params)
    assert jnp.array_equal(exact, params)
    assert jnp.array_equal(rest, jnp.zeros_like(rest))
    assert jnp.array_equal(small, params.astype(jnp.bfloat16))


@dataclasses.dataclass(frozen=True)
class Vector(ema.Schedule):
    """Gives a weight for each of two things."""

    def weight(self, count, span=1, xp=None):
        return xp.stack([count, count])


def test_a_traced_weight_that_is_no_number_is_refused():
    with pytest.raises(
        ema.ArgumentTypeError, match=r"must be a number, got an array of shape \(2,"
    ):
        jax.jit(lambda count: update_weight(Vector(), count, 1, jnp.float32))(jnp.int32(1))


@dataclasses.dataclass(frozen=True)
class Branching(ema.Schedule):
    """Cannot be traced."""

    def weight(self, count, span=1, xp=None):
        return 0.5 if count > 1 else 1.0


def test_a_schedule_that_cannot_be_traced_is_refused_with_the_first_line_of_the_reason():
    with pytest.raises(ema.ArgumentError, match="Attempted boolean conversion of traced array"):
        jax.jit(lambda count: update_weight(Branching(), count, 1, jnp.float32))(jnp.int32(1))
