"""The code blocks of the page on files run, and the examples in the docstrings."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import safetensors.torch
import torch
import torch_ema

import ema.checkpoint.reader
import ema.jax_backend.saving.files
from ema.checkpoint import read_state
from ema.checkpoint.record import OWN_KEYS

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_the_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {
        "model": torch.nn.Linear(4, 2),
        "params": {"w": jnp.ones(3)},
        "torch": torch,
        "torch_ema": torch_ema,
        "safetensors": safetensors,
        "optax": optax,
        "jnp": jnp,
        "np": np,
    }
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)
    assert names["resumed"].count == 1
    kernel = names["state"].params_ema["kernel"]
    np.testing.assert_array_equal(kernel, names["linear"].weight.detach().numpy().T)
    assert list(read_state("run/theirs").tensors) == ["bias", "weight"]


def test_the_page_lists_every_key_of_the_format():
    table = PAGE.read_text().partition("## The format")[2]
    assert [key for key in OWN_KEYS if f"`{key}`" not in table] == []


def test_the_examples_in_the_docstrings_print_what_they_show():
    for module in (ema.checkpoint.reader, ema.jax_backend.saving.files):
        result = doctest.testmod(module)
        assert (result.failed, result.attempted > 3) == (0, True)
