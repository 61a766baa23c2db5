"""Bad arguments: one clear error each."""

import math

import pytest
import torch

import ema
from ema import ArgumentError, ArgumentTypeError
from ema.torch_backend import EMACallback, EMAModel


@pytest.fixture(params=["EMAModel", "EMACallback"])
def make(request, model):
    """Both constructors check the same."""
    if request.param == "EMAModel":
        return lambda **options: EMAModel(model, **options)
    return EMACallback


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 1.5}, ArgumentError, r"`decay` must lie in \[0, 1\], got 1.5"),
        ({"decay": -0.1}, ArgumentError, r"`decay` must lie in \[0, 1\], got -0.1"),
        ({"decay": math.nan}, ArgumentError, "`decay` must be finite, got nan"),
        ({"decay": True}, ArgumentTypeError, "`decay` must be a number .* or a schedule, got True"),
        ({"decay": "0.9"}, ArgumentTypeError, "`decay` must be a number .* or a schedule"),
        ({"decay": ema.HalfLife}, ArgumentTypeError, "with its fields, got the class HalfLife"),
        ({"decay": lambda n: 0.9}, ArgumentTypeError, "`decay` must be"),
        ({"update_every": 0}, ArgumentError, "`update_every` must be at least 1, got 0"),
        ({"update_every": 1.5}, ArgumentTypeError, "`update_every` must be an integer, got 1.5"),
        ({"update_after_step": -1}, ArgumentError, "`update_after_step` must be at least 0"),
        ({"update_after_step": True}, ArgumentTypeError, "`update_after_step` must be an integer"),
        (
            {"dtype": torch.float16},
            ArgumentError,
            "`dtype` must be float32, float64 or bfloat16",
        ),
        ({"dtype": "float32"}, ArgumentTypeError, "`dtype` must be a dtype"),
        ({"device": "gpu"}, ArgumentError, "`device` must name a device, got 'gpu'"),
        ({"device": 1.0}, ArgumentTypeError, "`device` must be a torch.device"),
    ],
)
def test_refused_with_name_rule_and_value(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_an_unknown_argument_is_a_typo(make):
    with pytest.raises(TypeError, match="upate_every"):
        make(upate_every=2)
