"""For each peer, the setting of ours that gives its averages; ``docs/peers.md`` is this table."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ema.jax_backend import get_params_ema, params_ema
from ema.schedules import (
    CosineDecay,
    DebiasedDecay,
    ExponentialRamp,
    HalfLifeRampup,
    InverseGammaWarmup,
    PowerFunction,
    RampWarmup,
    UniformAverage,
)
from ema.torch_backend import EMAModel

STEPS = 200
TOLERANCE = 1e-5

# peer, its settings, ours, and the first step from which the two are compared
ROWS = {
    "AveragedModel": (
        "AveragedModel",
        {"multi_avg_fn": get_ema_multi_avg_fn(0.99)},
        {"decay": 0.99, "update_after_step": 1},
        1,
    ),
    "AveragedModel, equal weights": (
        "AveragedModel",
        {"multi_avg_fn": get_swa_multi_avg_fn()},
        {"decay": UniformAverage()},
        1,
    ),
    "diffusers": (
        "diffusers",
        {"decay": 0.9},
        {"decay": RampWarmup(decay=0.9), "update_after_step": 1},
        1,
    ),
    "diffusers, foreach, later": (
        "diffusers",
        {"decay": 0.9, "update_after_step": 30, "foreach": True},
        {"decay": RampWarmup(decay=0.9), "update_after_step": 31},
        1,
    ),
    "diffusers, warmup": (
        "diffusers",
        {"decay": 0.95, "use_ema_warmup": True},
        {"decay": InverseGammaWarmup(decay=0.95), "update_after_step": 1},
        1,
    ),
    "diffusers, warmup with everything": (
        "diffusers",
        {
            "decay": 0.95,
            "use_ema_warmup": True,
            "inv_gamma": 10.0,
            "power": 0.75,
            "min_decay": 0.5,
            "update_after_step": 20,
        },
        {
            "decay": InverseGammaWarmup(decay=0.95, inv_gamma=10.0, power=0.75, min_decay=0.5),
            "update_after_step": 21,
        },
        1,
    ),
    "diffusers, constant": (
        "diffusers",
        {"decay": 0.99, "min_decay": 0.99},
        {"decay": 0.99, "update_after_step": 1},
        1,
    ),
    "ema-pytorch, every step": (
        "ema-pytorch",
        {"beta": 0.95, "update_after_step": 0, "update_every": 1},
        {"decay": InverseGammaWarmup(decay=0.95), "update_after_step": 1},
        1,
    ),
    "ema-pytorch, defaults": (
        "ema-pytorch",
        {},
        {
            "decay": InverseGammaWarmup(decay=0.9999, inv_gamma=1 / 10),
            "update_after_step": 101,
            "update_every": 10,
        },
        101,
    ),
    "ema-pytorch, everything": (
        "ema-pytorch",
        {
            "beta": 0.9,
            "update_after_step": 20,
            "update_every": 5,
            "inv_gamma": 2.0,
            "power": 0.75,
            "min_value": 0.3,
            "use_foreach": True,
        },
        {
            "decay": InverseGammaWarmup(decay=0.9, inv_gamma=2.0 / 5, power=0.75, min_decay=0.3),
            "update_after_step": 21,
            "update_every": 5,
        },
        21,
    ),
    "ema-pytorch, constant": (
        "ema-pytorch",
        {"beta": 0.9, "min_value": 0.9, "update_after_step": 20, "update_every": 3},
        {"decay": 0.9, "update_after_step": 19, "update_every": 3},
        19,
    ),
    "torch-ema": (
        "torch-ema",
        {"decay": 0.95},
        {"decay": RampWarmup(decay=0.95)},
        1,
    ),
    "torch-ema, constant": (
        "torch-ema",
        {"decay": 0.99, "use_num_updates": False},
        {"decay": 0.99},
        1,
    ),
    "timm": ("timm", {"decay": 0.99}, {"decay": 0.99}, 1),
    "timm, counted": (
        "timm",
        {"counted": True, "decay": 0.99, "update_after_step": 20},
        {"decay": 0.99, "update_after_step": 21},
        1,
    ),
    "timm, warmup with everything": (
        "timm",
        {
            "counted": True,
            "decay": 0.95,
            "use_warmup": True,
            "warmup_gamma": 10.0,
            "warmup_power": 0.75,
            "min_decay": 0.5,
            "update_after_step": 20,
            "foreach": False,
        },
        {
            "decay": InverseGammaWarmup(decay=0.95, inv_gamma=10.0, power=0.75, min_decay=0.5),
            "update_after_step": 21,
        },
        1,
    ),
    "nnx.EMA": ("nnx.EMA", {"decay": 0.99}, {"decay": 0.99}, 1),
    "incremental_update": ("incremental_update", {"step_size": 0.01}, {"decay": 0.99}, 1),
    "optax.ema": (
        "optax.ema",
        {"decay": 0.99, "debias": True},
        {"decay": DebiasedDecay(decay=0.99)},
        1,
    ),
    "EDM": (
        "EDM",
        {"ema_halflife_kimg": 0.5, "ema_rampup_ratio": 0.05, "batch_size": 100},
        {"decay": HalfLifeRampup(steps=5, rampup_ratio=0.05), "update_after_step": 1},
        1,
    ),
    "EDM2, narrow": (
        "EDM2",
        {"std": 0.05, "batch_size": 128},
        {"decay": PowerFunction.from_std(0.05)},
        1,
    ),
    "EDM2, wide": (
        "EDM2",
        {"std": 0.2, "batch_size": 128},
        {"decay": PowerFunction.from_std(0.2)},
        1,
    ),
    "EDM2, traditional": (
        "EDM2, traditional",
        {"halflife_Mimg": 0.0005, "rampup_ratio": 0.05, "batch_size": 100},
        {"decay": HalfLifeRampup(steps=5, rampup_ratio=0.05)},
        1,
    ),
    "DINO": (
        "DINO",
        {"momentum_teacher": 0.9, "epochs": 4, "iterations_per_epoch": 50},
        {"decay": CosineDecay(start=0.9, total_steps=200)},
        1,
    ),
    "BYOL": (
        "BYOL",
        {"base_target_ema": 0.9, "max_steps": 150},
        {"decay": CosineDecay(start=0.9, total_steps=150)},
        1,
    ),
    "torchtitan": (
        "torchtitan",
        {"half_life_fraction": 0.05},
        {"decay": HalfLifeRampup(steps=math.inf, rampup_ratio=0.05)},
        1,
    ),
    "torchtitan, not every step": (
        "torchtitan",
        {"half_life_fraction": 0.1, "update_every_n_steps": 3},
        {"decay": HalfLifeRampup(steps=math.inf, rampup_ratio=0.1), "update_every": 3},
        1,
    ),
    "ultralytics": (
        "ultralytics",
        {},
        {"decay": ExponentialRamp(decay=0.9999, tau=2000)},
        1,
    ),
    "ultralytics, faster": (
        "ultralytics",
        {"decay": 0.99, "tau": 30},
        {"decay": ExponentialRamp(decay=0.99, tau=30)},
        1,
    ),
}


class FromTransform:
    """``params_ema``, given the parameters of each step as they are (updates of zero)."""

    def __init__(self, model, **settings):
        self.model, self.tx = model, params_ema(**settings)
        self.state = self.tx.init(self._params())
        self.jitted = jax.jit(self.tx.update)

    def _params(self):
        return [jnp.array(p.detach().numpy(), copy=True) for p in self.model.parameters()]

    def update(self):
        params = self._params()
        _, self.state = self.jitted(jax.tree.map(jnp.zeros_like, params), self.state, params)

    def averages(self):
        return get_params_ema(self.state)


class FromModel:
    """``EMAModel``."""

    def __init__(self, model, **settings):
        self.peer = EMAModel(model, **settings)

    def update(self):
        self.peer.update()

    def averages(self):
        return list(self.peer.averaged_parameters().values())


@pytest.mark.parametrize("backend", [FromModel, FromTransform], ids=["torch", "jax"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_ours_gives_the_averages_of_the_peer(walk, make_peer, relative_error, backend, row):
    """With the documented setting the averages agree at every step of 200."""
    name, theirs, ours, since = row
    model = walk()
    peer, average = make_peer(name, model, **theirs), backend(model, **ours)
    for step in range(1, STEPS + 1):
        model.advance()
        peer.update()
        average.update()
        if step >= since:
            error = relative_error(average.averages(), peer.averages())
            assert error <= TOLERANCE, f"step {step}"


@pytest.mark.parametrize("name", ["AveragedModel", "ema-pytorch"])
def test_averaged_buffers_agree(name, make_peer, relative_error):
    """What these two do with floating-point buffers is ``buffers="average"``."""
    theirs = {
        "AveragedModel": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
        "ema-pytorch": {
            "beta": 0.9,
            "min_value": 0.9,
            "update_after_step": 0,
            "update_every": 1,
        },
    }
    model = nn.BatchNorm1d(4)
    peer = make_peer(name, model, **theirs[name])
    ours = EMAModel(model, decay=0.9, update_after_step=1, buffers="average")
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        model(torch.randn(8, 4, generator=generator))
        peer.update()
        ours.update()
        averaged = peer.peer.module if isinstance(peer.peer, AveragedModel) else peer.peer.ema_model
        averages = ours.averaged_parameters()
        for buffer in ("running_mean", "running_var"):
            assert relative_error([averages[buffer]], [getattr(averaged, buffer)]) <= TOLERANCE


@pytest.mark.parametrize("backend", ["numpy", "host"])
def test_the_momentum_of_a_whole_dino_run_is_that_of_its_table(make_peer, walk, backend):
    """100 epochs of 1 251 iterations from 0.996: each momentum to 1e-15, the first exactly."""
    settings = {"momentum_teacher": 0.996, "epochs": 100, "iterations_per_epoch": 1251}
    table = np.array(list(make_peer("DINO", walk(), **settings).decays))
    schedule = CosineDecay(start=0.996, total_steps=len(table))
    if backend == "numpy":
        ours = 1 - schedule.weight(np.arange(1.0, len(table) + 1), 1, np)
    else:
        ours = np.array([1 - schedule.weight(float(n)) for n in range(1, len(table) + 1)])
    np.testing.assert_allclose(ours, table, rtol=0, atol=1e-15)
    assert ours[0] == table[0] == 0.996


def test_buffers_of_ultralytics_agree(make_peer, relative_error):
    """Its ``ModelEMA`` averages all floating-point buffers: ``buffers="average"``."""
    model = nn.BatchNorm1d(4)
    peer = make_peer("ultralytics", model, decay=0.9, tau=10)
    decays = peer.decays
    peers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ours = EMAModel(model, ExponentialRamp(decay=0.9, tau=10), buffers="average")
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        model(torch.randn(8, 4, generator=generator))
        decay = next(decays)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                peers[name].mul_(decay).add_(buffer, alpha=1 - decay)
        ours.update()
        averages = ours.averaged_parameters()
        for name in ("running_mean", "running_var"):
            assert relative_error([averages[name]], [peers[name]]) <= TOLERANCE
