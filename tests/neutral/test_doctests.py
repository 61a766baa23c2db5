"""The examples in the docstrings of the neutral modules."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = {  # how many examples each has at least, so that a lost one is noticed
    "ema": 0,
    "ema.command.main": 0,
    "ema.decay": 5,
    "ema.errors": 0,
    "ema.extras": 0,
    "ema.info": 2,
    "ema.plan.model": 2,
    "ema.command.plan": 0,
    "ema.plan.table": 0,
    "ema.profiles": 0,
    "ema.profiles.closed": 2,
    "ema.profiles.coefficients": 3,
    "ema.profiles.combination": 3,
    "ema.profiles.nodes": 0,
    "ema.profiles.runs": 4,
    "ema.plan.quantities": 5,
    "ema.schedules": 0,
    "ema.selftest": 0,
    "ema.validate": 0,
    "ema.widths": 2,
}


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_print_what_they_show(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0
    assert result.attempted >= MODULES[module]
