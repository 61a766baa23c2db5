"""Ours and the peers on PyTorch, each with a constant decay, as the contenders of a case.

A new peer is one function ``(model, dtype) -> update`` here and its line in ``PEERS``. ``dtype`` is
that of the average, None where the peer decides: all of them take that of the parameters.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

import ema_pytorch
import torch
import torch_ema
from diffusers import training_utils
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from benchmarks.setting import DECAY
from benchmarks.timing import Contender
from ema.torch_backend import EMAModel

__all__ = ["FOREACH", "ONE_BY_ONE", "PEERS", "SWAPS", "ours", "swaps", "timm", "timm_utils"]
__all__ += ["updates"]

Update = Callable[[], object]
MODULES = ("torchvision", "torchvision.ops", "torchvision.ops.misc")


def ours(
    model: nn.Module, name: str = "ema", *, traffic: int | None = None, **options: Any
) -> Contender:
    """``EMAModel`` with options."""
    average = EMAModel(model, DECAY, **options)
    return Contender(name=name, call=average.update, kind="ours", traffic=traffic)


def averaged_model(model: nn.Module, dtype: torch.dtype | None) -> Update:
    """Its grouped function refuses two dtypes, the other one promotes."""
    if dtype is None:
        peer = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    else:
        peer = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY)).to(dtype)
    return lambda: peer.update_parameters(model)


def ema_pytorch_update(model: nn.Module, dtype: torch.dtype | None, *, use_foreach: bool) -> Update:
    peer = ema_pytorch.EMA(
        model,
        ema_model=None if dtype is None else copy.deepcopy(model).to(dtype),
        beta=DECAY,
        min_value=DECAY,
        update_after_step=0,
        update_every=1,
        use_foreach=use_foreach,
        coerce_dtype=dtype is not None,
    )
    return peer.update


def torch_ema_of(
    model: nn.Module, dtype: torch.dtype | None = None
) -> torch_ema.ExponentialMovingAverage:
    peer = torch_ema.ExponentialMovingAverage(
        model.parameters(), decay=DECAY, use_num_updates=False
    )
    peer.to(dtype=dtype)
    return peer


def torch_ema_update(model: nn.Module, dtype: torch.dtype | None) -> Update:
    peer = torch_ema_of(model, dtype)
    return lambda: peer.update(model.parameters())


def diffusers_of(
    model: nn.Module, dtype: torch.dtype | None = None, *, foreach: bool
) -> training_utils.EMAModel:
    peer = training_utils.EMAModel(
        model.parameters(), decay=DECAY, min_decay=DECAY, foreach=foreach
    )
    peer.to(dtype=dtype)
    return peer


def diffusers_update(model: nn.Module, dtype: torch.dtype | None, *, foreach: bool) -> Update:
    peer = diffusers_of(model, dtype, foreach=foreach)
    return lambda: peer.step(model.parameters())


@functools.cache
def timm_utils() -> ModuleType:
    """The real ``timm.utils``, also on a machine without torchvision.

    timm requires torchvision, whose wheels require a torch of their own, so the Makefile installs
    timm without its requirements. ``timm/__init__.py``, which loads the models and their
    transforms, does not run here. ``timm.utils`` asks torchvision for one class, to recognize layers
    that no model here has; an empty class stands for it.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    spec = find_spec("timm")
    if spec is None:
        raise ModuleNotFoundError("timm is missing: `pip install --no-deps timm`, as the Makefile")
    if find_spec("torchvision") is not None:
        return import_module("timm.utils")
    sys.modules.setdefault("timm", module_from_spec(spec))
    stubs = {name: ModuleType(name) for name in MODULES}
    frozen = type("FrozenBatchNorm2d", (nn.Module,), {})
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = frozen
    sys.modules.update(stubs)
    try:
        return import_module("timm.utils")
    finally:  # others ask whether torchvision is there, and would believe these
        for name in MODULES:
            del sys.modules[name]


def timm(
    model: nn.Module, dtype: torch.dtype | None, *, stochastic_rounding: bool = True
) -> Update:
    """``ModelEmaV3``, which rounds at random where the average is bfloat16."""
    peer = timm_utils().ModelEmaV3(
        model, decay=DECAY, dtype=dtype, stochastic_rounding=stochastic_rounding
    )
    return lambda: peer.update(model)


PEERS: Mapping[str, Callable[[nn.Module, torch.dtype | None], Update]] = {
    "AveragedModel": averaged_model,
    "ema-pytorch": partial(ema_pytorch_update, use_foreach=False),
    "ema-pytorch foreach": partial(ema_pytorch_update, use_foreach=True),
    "torch-ema": torch_ema_update,
    "diffusers": partial(diffusers_update, foreach=False),
    "diffusers foreach": partial(diffusers_update, foreach=True),
    "timm": timm,
}
FOREACH = {name for name in PEERS if name.endswith("foreach")}
ONE_BY_ONE = {name.removesuffix(" foreach") for name in FOREACH}


def updates(
    model: nn.Module, dtype: torch.dtype | None = None, *, without: Collection[str] = ()
) -> list[Contender]:
    """One update of the average of ``model``; ours first, in float32 whatever ``dtype`` is."""
    return [
        ours(model),
        *(
            Contender(name=name, call=make(model, dtype))
            for name, make in PEERS.items()
            if name not in without
        ),
    ]


def swap_ours(model: nn.Module, *, assign: bool) -> Update:
    average = EMAModel(model, DECAY)

    def swap() -> None:
        with average.use_ema(assign=assign):
            pass

    return swap


def swap_torch_ema(model: nn.Module) -> Update:
    average = torch_ema_of(model)

    def swap() -> None:
        with average.average_parameters(model.parameters()):
            pass

    return swap


def swap_diffusers(model: nn.Module, *, foreach: bool) -> Update:
    average = diffusers_of(model, foreach=foreach)

    def swap() -> None:
        average.store(model.parameters())
        average.copy_to(model.parameters())
        average.restore(model.parameters())

    return swap


SWAPS: Mapping[str, Callable[[nn.Module], Update]] = {
    "ema": partial(swap_ours, assign=False),
    "ema assign": partial(swap_ours, assign=True),
    "torch-ema": swap_torch_ema,
    "diffusers": partial(swap_diffusers, foreach=False),
    "diffusers foreach": partial(swap_diffusers, foreach=True),
}


def swaps(model: nn.Module) -> list[Contender]:
    """The average into ``model`` and the live weights back."""
    return [
        Contender(name=name, call=make(model), kind="ours" if name.startswith("ema") else "peer")
        for name, make in SWAPS.items()
    ]
