"""The peers, each behind the same two calls: ``update()`` and ``averages()``."""

from __future__ import annotations

import itertools
import math

import ema_pytorch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import training_utils
from flax import nnx
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch_ema import ExponentialMovingAverage

from benchmarks.peers import timm_utils


def to_jax(model):
    """The live parameters as JAX arrays of their own memory."""
    return [
        jnp.array(p.detach().float().numpy(), dtype=str(p.dtype).removeprefix("torch."), copy=True)
        for p in model.parameters()
    ]


class FromAveragedModel:
    def __init__(self, model, **settings):
        self.model, self.peer = model, AveragedModel(model, **settings)

    def update(self):
        self.peer.update_parameters(self.model)

    def averages(self):
        return list(self.peer.module.parameters())


class FromDiffusers:
    def __init__(self, model, **settings):
        self.model, self.peer = model, training_utils.EMAModel(model.parameters(), **settings)

    def update(self):
        self.peer.step(self.model.parameters())

    def averages(self):
        return self.peer.shadow_params


class FromEMAPytorch:
    def __init__(self, model, **settings):
        self.peer = ema_pytorch.EMA(model, **settings)

    def update(self):
        self.peer.update()

    def averages(self):
        return list(self.peer.ema_model.parameters())


class FromTorchEMA:
    def __init__(self, model, **settings):
        self.peer = ExponentialMovingAverage(model.parameters(), **settings)

    def update(self):
        self.peer.update()

    def averages(self):
        return self.peer.shadow_params


class FromTimm:
    """``ModelEmaV3``; with ``counted`` it is told the step, as timm's training script does."""

    def __init__(self, model, *, counted=False, **settings):
        self.model, self.counted, self.step = model, counted, 0
        self.peer = timm_utils().ModelEmaV3(model, **settings)

    def update(self):
        self.step += 1
        self.peer.update(self.model, step=self.step if self.counted else None)

    def averages(self):
        return list(self.peer.module.parameters())


class FromNnx:
    def __init__(self, model, **settings):
        self.model, self.peer = model, nnx.EMA(self._variables(to_jax(model)), **settings)

    def _variables(self, arrays):
        return nnx.List([nnx.Param(array) for array in arrays])

    def update(self):
        self.peer.update(self._variables(to_jax(self.model)))

    def averages(self):
        return jax.tree.leaves(nnx.as_pure(self.peer.params))


class FromIncrementalUpdate:
    def __init__(self, model, step_size):
        self.model, self.step_size, self.average = model, step_size, to_jax(model)

    def update(self):
        self.average = optax.incremental_update(to_jax(self.model), self.average, self.step_size)

    def averages(self):
        return self.average


class FromOptaxEMA:
    """``optax.ema``, made for gradients, on parameters."""

    def __init__(self, model, **settings):
        self.model, self.peer = model, optax.ema(**settings)
        self.state, self.average = self.peer.init(to_jax(model)), to_jax(model)

    def update(self):
        self.average, self.state = self.peer.update(to_jax(self.model), self.state)

    def averages(self):
        return self.average


class FromEDM:
    """The lines of EDM's ``training_loop.py`` (github.com/NVlabs/edm), which is no package."""

    def __init__(self, model, ema_halflife_kimg, ema_rampup_ratio, batch_size):
        self.model, self.batch_size = model, batch_size
        self.halflife_nimg, self.rampup_ratio = ema_halflife_kimg * 1000, ema_rampup_ratio
        self.cur_nimg = 0
        self.average = [p.detach().clone() for p in model.parameters()]

    def update(self):
        ema_halflife_nimg = min(self.halflife_nimg, self.cur_nimg * self.rampup_ratio)
        ema_beta = 0.5 ** (self.batch_size / max(ema_halflife_nimg, 1e-8))
        for p_ema, p_net in zip(self.average, self.model.parameters(), strict=True):
            p_ema.copy_(p_net.detach().lerp(p_ema, ema_beta))
        self.cur_nimg += self.batch_size

    def averages(self):
        return self.average


class FromFormula:
    """A peer that cannot be installed here: its decay at each call, in our own words.

    Its average starts as a copy of the parameters and is ``decay · average + (1 − decay) · params``.
    """

    def __init__(self, model, **settings):
        self.model, self.decays = model, self.decays_of(**settings)
        self.average = [p.detach().clone() for p in model.parameters()]

    def update(self):
        decay = next(self.decays)
        if decay is None:
            return
        for average, params in zip(self.average, self.model.parameters(), strict=True):
            average.mul_(decay).add_(params.detach(), alpha=1 - decay)

    def averages(self):
        return self.average


class FromDINO(FromFormula):
    """``main_dino.py`` (github.com/facebookresearch/dino): a table, read at the iteration from 0."""

    @staticmethod
    def decays_of(momentum_teacher, epochs, iterations_per_epoch):
        iterations = np.arange(epochs * iterations_per_epoch)
        cosine = np.cos(np.pi * iterations / len(iterations))
        return iter(1.0 + 0.5 * (momentum_teacher - 1.0) * (1.0 + cosine))


class FromBYOL(FromFormula):
    """``byol/utils/schedules.py`` (github.com/google-deepmind/deepmind-research), steps from 0."""

    @staticmethod
    def decays_of(base_target_ema, max_steps):
        for step in range(2 * max_steps):  # the step is held at the end
            cosine = math.cos(math.pi * min(step, max_steps) / max_steps)
            yield 1.0 - (1.0 - base_target_ema) * 0.5 * (1.0 + cosine)


class FromTorchtitan(FromFormula):
    """``torchtitan/components/ema.py`` (github.com/pytorch/torchtitan), steps from 1."""

    @staticmethod
    def decays_of(half_life_fraction, update_every_n_steps=1):
        for step in itertools.count(1):
            updates, rest = divmod(step, update_every_n_steps)
            yield None if rest else 2.0 ** (-1.0 / (half_life_fraction * updates))


class FromUltralytics(FromFormula):
    """``ModelEMA`` of YOLOv5 and ultralytics (github.com/ultralytics): updates from 1."""

    @staticmethod
    def decays_of(decay=0.9999, tau=2000):
        return (decay * (1.0 - math.exp(-updates / tau)) for updates in itertools.count(1))


class FromEDM2(FromFormula):
    """``training/phema.py`` (github.com/NVlabs/edm2): the time after the step, in images."""

    @staticmethod
    def decays_of(std, batch_size):
        # std² = (γ + 1) / ((γ + 2)² (γ + 3)) as a polynomial in γ
        roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
        gamma = roots.real.max()
        for step in itertools.count(1):
            yield (1.0 - batch_size / (step * batch_size)) ** (gamma + 1.0)


class FromEDM2Traditional(FromFormula):
    """``TraditionalEMA`` of the same file: EDM's formula with the time after the step."""

    @staticmethod
    def decays_of(halflife_Mimg, rampup_ratio, batch_size):
        for step in itertools.count(1):
            half_life = min(halflife_Mimg * 1e6, step * batch_size * rampup_ratio)
            yield 0.5 ** (batch_size / max(half_life, 1e-8))


PEERS = {
    "AveragedModel": FromAveragedModel,
    "diffusers": FromDiffusers,
    "ema-pytorch": FromEMAPytorch,
    "torch-ema": FromTorchEMA,
    "timm": FromTimm,
    "nnx.EMA": FromNnx,
    "incremental_update": FromIncrementalUpdate,
    "optax.ema": FromOptaxEMA,
    "EDM": FromEDM,
    "EDM2": FromEDM2,
    "EDM2, traditional": FromEDM2Traditional,
    "DINO": FromDINO,
    "BYOL": FromBYOL,
    "torchtitan": FromTorchtitan,
    "ultralytics": FromUltralytics,
}


class Walk(nn.Module):
    """Three parameters that walk at random, the same way every time."""

    def __init__(self, noise=0.1):
        super().__init__()
        self.generator, self.noise = torch.Generator().manual_seed(0), noise
        for name, shape in (("weight", (16, 8)), ("bias", (8,)), ("scale", ())):
            start = torch.randn(shape, generator=self.generator)
            self.register_parameter(name, nn.Parameter(start))

    @torch.no_grad()
    def advance(self):
        for p in self.parameters():
            p.add_(torch.randn(p.shape, generator=self.generator), alpha=self.noise)


@pytest.fixture
def walk():
    return Walk


@pytest.fixture
def make_peer():
    """``make_peer(name, model, **settings)``; the settings are the peer's own."""

    def make(name, model, **settings):
        return PEERS[name](model, **settings)

    return make


@pytest.fixture
def relative_error():
    """Largest |Δ| over largest |reference| of two lists of tensors, the worst of them."""

    def error(averages, references):
        pairs = [
            (np.asarray(_numpy(a), np.float64), np.asarray(_numpy(b), np.float64))
            for a, b in zip(averages, references, strict=True)
        ]
        return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)

    return error


def _numpy(array):
    return array.detach().double().numpy() if isinstance(array, torch.Tensor) else array
