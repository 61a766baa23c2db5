"""One clear error for each mistake; the state given stays usable."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ema
from ema.jax_backend import params_ema


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"decay": 1.1}, ema.ArgumentError, r"`decay` must lie in \[0, 1\], got 1.1"),
        ({"decay": -0.1}, ema.ArgumentError, r"`decay` must lie in \[0, 1\]"),
        ({"decay": float("nan")}, ema.ArgumentError, "`decay` must be finite, got nan"),
        ({"decay": jnp.float32(1.5)}, ema.ArgumentError, r"`decay` must lie in \[0, 1\], got 1.5"),
        ({"decay": jnp.float16(0.9999)}, ema.ArgumentError, "at least float32, got float16"),
        ({"decay": np.float16(0.5)}, ema.ArgumentError, "at least float32, got float16"),
        ({"decay": jnp.ones(2)}, ema.ArgumentTypeError, r"`decay` must be a scalar.*\(2,\)"),
        ({"decay": jnp.array(True)}, ema.ArgumentTypeError, "`decay` must be a real number"),
        ({"decay": "0.999"}, ema.ArgumentTypeError, "`decay` must be a number in .* or a schedule"),
        ({"decay": True}, ema.ArgumentTypeError, "`decay` must be a number in"),
        ({"decay": ema.HalfLife}, ema.ArgumentTypeError, "got the class HalfLife"),
        ({"decay": lambda n: 0.9}, ema.ArgumentTypeError, "`decay` must be a number in"),
        ({"update_every": 0}, ema.ArgumentError, "`update_every` must be at least 1, got 0"),
        ({"update_every": jnp.int32(0)}, ema.ArgumentError, "`update_every` must be at least 1"),
        ({"update_every": 2.0}, ema.ArgumentTypeError, "`update_every` must be an integer"),
        ({"update_every": jnp.float32(2)}, ema.ArgumentTypeError, "must be an integer.*float32"),
        ({"update_every": 1 << 31}, ema.ArgumentError, r"`update_every` must be below 2\*\*31"),
        ({"update_after_step": 10**12}, ema.ArgumentError, r"`update_after_step` must be below"),
        ({"update_after_step": -1}, ema.ArgumentError, "`update_after_step` must be at least 0"),
        ({"update_after_step": jnp.ones(2, jnp.int32)}, ema.ArgumentTypeError, "a scalar"),
        (
            {"accumulator_dtype": "float16"},
            ema.ArgumentError,
            "range ends at 65504.*bfloat16 is as",
        ),
        (
            {"accumulator_dtype": "int32"},
            ema.ArgumentError,
            "float32, float64 or bfloat16, got int32",
        ),
        ({"compensated": 1}, ema.ArgumentTypeError, "`compensated` must be .*, got 1"),
        (
            {"compensated": True, "accumulator_dtype": jnp.bfloat16},
            ema.ArgumentError,
            "`compensated` must be False where `accumulator_dtype` is bfloat16",
        ),
        (
            {"stochastic_rounding": None},
            ema.ArgumentTypeError,
            "`stochastic_rounding` must be .*, got None",
        ),
        ({"seed": -1}, ema.ArgumentError, "`seed` must be at least 0, got -1"),
        ({"seed": 2**64}, ema.ArgumentError, "`seed` must be below"),
        ({"seed": 0.5}, ema.ArgumentTypeError, "`seed` must be an integer"),
        ({"on_nonfinite": "ignore"}, ema.ArgumentError, "'propagate', 'skip' or 'raise', got 'ign"),
        ({"accumulator_dtype": "foo"}, ema.ArgumentTypeError, "must be a dtype, got 'foo'"),
        ({"name": 3}, ema.ArgumentTypeError, "`name` must name averages by strings, got 3"),
        ({"name": ""}, ema.ArgumentError, "`name` must not hold an empty name"),
        ({"decay": {}}, ema.ArgumentError, "`decay` must name at least one average"),
        ({"decay": {1: 0.9}}, ema.ArgumentTypeError, "`decay` must name averages by strings"),
        ({"decay": {"": 0.9}}, ema.ArgumentError, "`decay` must not hold an empty name"),
        ({"decay": {"a": 1.1}}, ema.ArgumentError, r"`decay\['a'\]` must lie in \[0, 1\], got 1.1"),
        ({"decay": {"a": 0.9}, "name": "b"}, ema.ArgumentError, "`name` must not be given"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        params_ema(**arguments)


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        params_ema(0.9, 5)


def test_update_without_params(params):
    tx = params_ema(0.9)
    state = tx.init(params)
    with pytest.raises(ema.ArgumentError, match=r"`params` must be given.*tx\.update\("):
        tx.update(params, state)
    _, state = tx.update(params, state, params)
    assert int(state.count) == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"bias": jnp.ones(5)}, "missing: `dense.kernel`"),
        (
            {"dense": {"kernel": jnp.ones((4, 4)), "extra": jnp.ones(1)}, "bias": jnp.ones(5)},
            "unexpected: `dense.extra`",
        ),
        (
            {"dense": {"kernel": jnp.ones((4, 2))}, "bias": jnp.ones(5)},
            r"`dense.kernel` has shape \(4, 2\), its average has \(4, 4\)",
        ),
        (
            {"dense": {"kernel": jnp.ones((4, 4))}, "bias": jnp.ones(5, jnp.int32)},
            "`bias` is int32, its average is float32",
        ),
        (
            {"dense": [jnp.ones((4, 4))], "bias": jnp.ones(5)},
            "missing: `dense.kernel`; unexpected: `dense.0`",
        ),
    ],
)
def test_params_of_another_model(params, other, message):
    """Everything that differs is listed, and nothing was updated."""
    tx = params_ema(0.9)
    state = tx.init(params)
    with pytest.raises(ema.ModelError, match=message):
        tx.update(other, state, other)
    jax.tree.map(np.testing.assert_array_equal, state, tx.init(params))
