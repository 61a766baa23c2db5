"""The page on moving a transformers model's average into Flax does what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_the_average_goes_to_flax_and_back():
    file = Path(__file__).parents[2] / "examples" / "transformers_to_flax.py"
    spec = importlib.util.spec_from_file_location("transformers_to_flax", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main()
    assert found["step"] == 40
    assert found["to Flax"] < 1e-5
    assert found["and back"] < 1e-5
