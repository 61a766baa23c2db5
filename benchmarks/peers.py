"""The peers on PyTorch, each with its decay constant, as the contenders of a case.

A new peer is one function here; ``updates`` or ``swaps`` then lists it.
"""

from __future__ import annotations

from collections.abc import Callable

import ema_pytorch
import torch_ema
from diffusers import training_utils
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.measure import Contender
from ema.torch_backend import EMAModel

__all__ = ["DECAY", "swaps", "updates"]

DECAY = 0.999


def averaged_model(model: nn.Module) -> Callable[[], object]:
    peer = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return lambda: peer.update_parameters(model)


def ema_pytorch_update(model: nn.Module, *, use_foreach: bool) -> Callable[[], object]:
    peer = ema_pytorch.EMA(
        model,
        beta=DECAY,
        min_value=DECAY,
        update_after_step=0,
        update_every=1,
        use_foreach=use_foreach,
    )
    return peer.update


def torch_ema_of(model: nn.Module) -> torch_ema.ExponentialMovingAverage:
    return torch_ema.ExponentialMovingAverage(
        model.parameters(), decay=DECAY, use_num_updates=False
    )


def diffusers_of(model: nn.Module, *, foreach: bool) -> training_utils.EMAModel:
    return training_utils.EMAModel(
        model.parameters(), decay=DECAY, min_decay=DECAY, foreach=foreach
    )


def diffusers_update(model: nn.Module, *, foreach: bool) -> Callable[[], object]:
    peer = diffusers_of(model, foreach=foreach)
    return lambda: peer.step(model.parameters())


def updates(model: nn.Module) -> list[Contender]:
    """One update of the average of ``model``."""
    peers = {
        "AveragedModel": averaged_model(model),
        "ema-pytorch": ema_pytorch_update(model, use_foreach=False),
        "ema-pytorch foreach": ema_pytorch_update(model, use_foreach=True),
        "torch-ema": torch_ema_of(model).update,
        "diffusers": diffusers_update(model, foreach=False),
        "diffusers foreach": diffusers_update(model, foreach=True),
    }
    return [
        Contender(name="ema", call=EMAModel(model, DECAY).update, kind="ours"),
        *(Contender(name=name, call=call) for name, call in peers.items()),
    ]


def swaps(model: nn.Module) -> list[Contender]:
    """The average into ``model`` and the live weights back."""
    ours, theirs = EMAModel(model, DECAY), torch_ema_of(model)
    diffusers = {foreach: diffusers_of(model, foreach=foreach) for foreach in (False, True)}

    def swap_ours() -> None:
        with ours.use_ema():
            pass

    def swap_torch_ema() -> None:
        with theirs.average_parameters():
            pass

    def swap_diffusers(*, foreach: bool) -> None:
        peer = diffusers[foreach]
        peer.store(model.parameters())
        peer.copy_to(model.parameters())
        peer.restore(model.parameters())

    return [
        Contender(name="ema", call=swap_ours, kind="ours"),
        Contender(name="torch-ema", call=swap_torch_ema),
        Contender(name="diffusers", call=lambda: swap_diffusers(foreach=False)),
        Contender(name="diffusers foreach", call=lambda: swap_diffusers(foreach=True)),
    ]
