"""Both backends refuse the same mistake with the same class of error and in the same words."""

import re
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from ema import ArgumentError, ArgumentTypeError, EMACallback, EMAModel, HalfLife
from ema.jax_backend import params_ema
from ema.jax_backend.nnx import EMA

NAMES = {"dtype": "accumulator_dtype"}
"""Arguments that have another name in JAX."""


def model(**options):
    return EMAModel(nn.Linear(2, 1), **options)


def in_jax(make):
    def made(**options):
        return make(**{NAMES.get(name, name): value for name, value in options.items()})

    return made


EVERYWHERE = {
    "EMAModel": model,
    "EMACallback": EMACallback,
    "params_ema": in_jax(params_ema),
    "nnx.EMA": in_jax(lambda **options: EMA(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), **options)),
}
WITH_NAMES = ("EMAModel", "params_ema")

OPTIONS = [
    ({"decay": 1.1}, ArgumentError, "`decay` must lie in [0, 1], got 1.1"),
    ({"decay": -0.1}, ArgumentError, "`decay` must lie in [0, 1], got -0.1"),
    ({"decay": float("nan")}, ArgumentError, "`decay` must be finite, got nan"),
    ({"decay": Fraction(10) ** 400}, ArgumentError, "`decay` must be finite, got inf"),
    (
        {"decay": "0.9"},
        ArgumentTypeError,
        "`decay` must be a number in [0, 1] or a schedule, got '0.9' (str)",
    ),
    (
        {"decay": True},
        ArgumentTypeError,
        "`decay` must be a number in [0, 1] or a schedule, got True (bool)",
    ),
    (
        {"decay": None},
        ArgumentTypeError,
        "`decay` must be a number in [0, 1] or a schedule, got None (NoneType)",
    ),
    (
        {"decay": HalfLife},
        ArgumentTypeError,
        "`decay` must be a schedule with its fields, got the class HalfLife",
    ),
    ({"update_after_step": -1}, ArgumentError, "`update_after_step` must be at least 0, got -1"),
    (
        {"update_after_step": 1.0},
        ArgumentTypeError,
        "`update_after_step` must be an integer, got 1.0 (float)",
    ),
    (
        {"update_after_step": True},
        ArgumentTypeError,
        "`update_after_step` must be an integer, got True (bool)",
    ),
    ({"update_every": 0}, ArgumentError, "`update_every` must be at least 1, got 0"),
    (
        {"update_every": "1"},
        ArgumentTypeError,
        "`update_every` must be an integer, got '1' (str)",
    ),
    ({"compensated": 1}, ArgumentTypeError, "`compensated` must be True or False, got 1"),
    (
        {"stochastic_rounding": None},
        ArgumentTypeError,
        "`stochastic_rounding` must be True or False, got None",
    ),
    ({"seed": -1}, ArgumentError, "`seed` must be at least 0, got -1"),
    ({"seed": 2**64}, ArgumentError, "`seed` must be below 2**64, got 18446744073709551616"),
    ({"seed": 0.5}, ArgumentTypeError, "`seed` must be an integer, got 0.5 (float)"),
    (
        {"on_nonfinite": "ignore"},
        ArgumentError,
        "`on_nonfinite` must be 'propagate', 'skip' or 'raise', got 'ignore'",
    ),
    (
        {"on_nonfinite": None},
        ArgumentError,
        "`on_nonfinite` must be 'propagate', 'skip' or 'raise', got None",
    ),
    ({"dtype": "foo"}, ArgumentTypeError, "`dtype` must be a dtype, got 'foo'"),
]
MAPPINGS = [
    ({}, ArgumentError, "`decay` must name at least one average, got {}"),
    ({"": 0.9}, ArgumentError, "`decay` must not hold an empty name, got ''"),
    ({1: 0.9}, ArgumentTypeError, "`decay` must name averages by strings, got 1 (int)"),
    ({None: 0.9}, ArgumentTypeError, "`decay` must name averages by strings, got None (NoneType)"),
    ({"a": 2.0}, ArgumentError, "`decay['a']` must lie in [0, 1], got 2.0"),
    (
        {"a": 0.9, "b": "c"},
        ArgumentTypeError,
        "`decay['b']` must be a number in [0, 1] or a schedule, got 'c' (str)",
    ),
]
DTYPES = [
    ("float16", ": its range ends at 65504, and weights overflow; bfloat16 is as small"),
    ("int32", ""),
    ("complex64", ""),
]


def said_by(make, error, **options):
    """The text of the error, with the names of PyTorch's arguments."""
    with pytest.raises(error) as caught:
        make(**options)
    assert type(caught.value) is error
    return re.sub(r"`accumulator_dtype`", "`dtype`", str(caught.value))


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("options", "error", "text"), OPTIONS, ids=lambda value: str(value)[:40])
def test_an_option_out_of_range(where, options, error, text):
    assert said_by(EVERYWHERE[where], error, **options) == text


@pytest.mark.parametrize("where", WITH_NAMES)
@pytest.mark.parametrize(("decay", "error", "text"), MAPPINGS, ids=lambda value: str(value)[:40])
def test_a_mapping_that_names_no_averages(where, decay, error, text):
    assert said_by(EVERYWHERE[where], error, decay=decay) == text


@pytest.mark.parametrize("where", EVERYWHERE)
@pytest.mark.parametrize(("dtype", "reason"), DTYPES)
def test_a_dtype_that_no_average_has(where, dtype, reason):
    theirs = getattr(torch, dtype) if where in ("EMAModel", "EMACallback") else dtype
    text = f"`dtype` must be float32, float64 or bfloat16, got {dtype}{reason}"
    assert said_by(EVERYWHERE[where], ArgumentError, dtype=theirs) == text


@pytest.mark.parametrize("where", EVERYWHERE)
def test_a_compensated_average_in_bfloat16(where):
    dtype = torch.bfloat16 if where in ("EMAModel", "EMACallback") else jnp.bfloat16
    assert said_by(EVERYWHERE[where], ArgumentError, dtype=dtype, compensated=True) == (
        "`compensated` must be False where `dtype` is bfloat16, got True: stochastic rounding is"
        " what keeps such an average moving"
    )


@pytest.mark.parametrize("decay", [{"a": 0.9, "b": 0.99}, 0.9], ids=["several", "one"])
@pytest.mark.parametrize("name", ["c", "", 3])
def test_a_name_that_no_average_has(decay, name):
    from ema.jax_backend import get_params_ema

    expected = (
        f"`name` must be one of `a`, `b`, got {name!r}"
        if isinstance(decay, dict)
        else f"`name` must not be given for one average, got {name!r}"
    )
    state = params_ema(decay).init(np.ones(2, np.float32))
    texts = [
        said_by(model(decay=decay).averaged_parameters, ArgumentError, name=name),
        said_by(lambda name: get_params_ema(state, None, name), ArgumentError, name=name),
    ]
    assert texts == [expected] * 2
