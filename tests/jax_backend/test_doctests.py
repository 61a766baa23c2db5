"""The examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = {  # how many examples each has at least, so that a lost one is noticed
    "ema.jax_backend": 5,
    "ema.jax_backend.access": 5,
    "ema.jax_backend.batch_norm": 4,
    "ema.jax_backend.linen": 6,
    "ema.jax_backend.nnx": 10,
    "ema.jax_backend.saving.restore": 6,
    "ema.jax_backend.transform": 8,
    "ema.jax_backend.update.equation": 8,
}


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_print_what_they_show(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0
    assert result.attempted >= MODULES[module]
