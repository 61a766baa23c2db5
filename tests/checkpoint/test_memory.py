"""How much memory a save and a load take at their peak, in a process of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import processes

TENSOR = 16  # MiB
TENSORS = 12

TORCH = f"""
import torch
from torch import nn
from ema import EMAModel
model = nn.ParameterList(
    [nn.Parameter(torch.randn({TENSOR} << 18)) for _ in range({TENSORS})]
)
average = EMAModel(model, 0.9)
def save(): average.save(sys.argv[1])
def load(): average.load(sys.argv[1])
kept = 0
"""
JAX = f"""
import jax, jax.numpy as jnp
from ema.jax_backend import load_params_ema, params_ema, save_params_ema
state = params_ema(0.9).init([jnp.ones({TENSOR} << 18) for _ in range({TENSORS})])
loaded = None
def save(): save_params_ema(sys.argv[1], state)
def load():
    global loaded
    loaded = load_params_ema(sys.argv[1], state)
kept = {TENSOR * TENSORS}  # the new average; the old one is the caller's
"""
MEASURE = """
def high():
    text = open("/proc/self/status").read()
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", text)[1]) / 1024

def now():
    text = open("/proc/self/status").read()
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", text)[1]) / 1024

save(); save()
for call in (save, load):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins here
    before = now()
    call()
    print(high() - before - (kept if call is load else 0))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's accounting")
@pytest.mark.parametrize("backend", [TORCH, JAX], ids=["torch", "jax"])
def test_a_save_and_a_load_take_at_most_one_tensor(tmp_path, backend):
    code = "import re, sys\n" + backend + MEASURE
    result = processes.run([sys.executable, "-c", code, tmp_path])
    saving, loading = map(float, result.stdout.split())
    assert saving < TENSOR + 4
    assert loading < TENSOR + 4
    print(f"save {saving:.1f} MiB, load {loading:.1f} MiB, a tensor {TENSOR} MiB")
