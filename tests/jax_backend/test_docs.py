"""The code blocks of ``docs/jax.md`` run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import jax

PAGE = Path(__file__).parents[2] / "docs" / "jax.md"


def test_the_blocks_of_the_jax_page_run():
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 11
    with jax.numpy_dtype_promotion("standard"):  # optax's adamw mixes dtypes itself
        for block in blocks:
            exec(block, names)
    assert int(names["opt_state"][-1].count) == 0
    assert names["averaged"].keys() == {"w", "b"}
    assert names["target"][-1].params_ema["w"].sharding.is_equivalent_to(names["split"], 2)
    assert names["prediction"].shape == (8, 2)
