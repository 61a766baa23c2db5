"""Ours and the peers on PyTorch, each with a constant decay, as the contenders of a case.

A new peer is one function ``(model, dtype) -> update`` here and its line in ``UPDATES``. ``dtype`` is
that of the average, None where the package decides: the peers take that of the parameters.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
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

__all__ = ["FOREACH", "ONE_BY_ONE", "SWAPS", "UPDATES", "kind", "ours", "swaps", "timm"]
__all__ += ["timm_utils", "updates"]

Call = Callable[[], object]
STUBS = ("torchvision", "torchvision.ops", "torchvision.ops.misc")


def ours(
    model: nn.Module, name: str = "ema", *, traffic: int | None = None, **options: Any
) -> Contender:
    """One update by ``EMAModel`` with options."""
    update = EMAModel(model, DECAY, **options).update
    return Contender(name, update, kind="ours", traffic=traffic)


def ema_swap(model: nn.Module, *, assign: bool) -> Call:
    average = EMAModel(model, DECAY)
    return lambda: enter_and_exit(average.use_ema(assign=assign))


def enter_and_exit(block: AbstractContextManager[object]) -> None:
    with block:
        pass


def averaged_model(model: nn.Module, dtype: torch.dtype | None = None) -> Call:
    """Its grouped function refuses two dtypes, the other one promotes."""
    if dtype is None:
        peer = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    else:
        peer = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY)).to(dtype)
    return lambda: peer.update_parameters(model)


def ema_pytorch_update(
    model: nn.Module, dtype: torch.dtype | None = None, *, foreach: bool
) -> Call:
    peer = ema_pytorch.EMA(
        model,
        ema_model=None if dtype is None else copy.deepcopy(model).to(dtype),
        beta=DECAY,
        min_value=DECAY,
        update_after_step=0,
        update_every=1,
        use_foreach=foreach,
        coerce_dtype=dtype is not None,
    )
    return peer.update


def torch_ema_of(model: nn.Module, dtype: torch.dtype | None = None) -> Any:
    peer = torch_ema.ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates=False)
    peer.to(dtype=dtype)
    return peer


def torch_ema_update(model: nn.Module, dtype: torch.dtype | None = None) -> Call:
    peer = torch_ema_of(model, dtype)
    return lambda: peer.update(model.parameters())


def torch_ema_swap(model: nn.Module) -> Call:
    peer = torch_ema_of(model)
    return lambda: enter_and_exit(peer.average_parameters(model.parameters()))


def diffusers_of(model: nn.Module, dtype: torch.dtype | None = None, *, foreach: bool) -> Any:
    params = model.parameters()
    peer = training_utils.EMAModel(params, decay=DECAY, min_decay=DECAY, foreach=foreach)
    peer.to(dtype=dtype)
    return peer


def diffusers_update(model: nn.Module, dtype: torch.dtype | None = None, *, foreach: bool) -> Call:
    peer = diffusers_of(model, dtype, foreach=foreach)
    return lambda: peer.step(model.parameters())


def diffusers_swap(model: nn.Module, *, foreach: bool) -> Call:
    peer = diffusers_of(model, foreach=foreach)

    def swap() -> None:
        peer.store(model.parameters())
        peer.copy_to(model.parameters())
        peer.restore(model.parameters())

    return swap


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
    stubs = {name: ModuleType(name) for name in STUBS}
    frozen = type("FrozenBatchNorm2d", (nn.Module,), {})
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = frozen
    sys.modules.update(stubs)
    try:
        return import_module("timm.utils")
    finally:  # others ask whether torchvision is there, and would believe these
        for name in STUBS:
            del sys.modules[name]


def timm(model: nn.Module, dtype: torch.dtype | None = None, *, by_chance: bool = True) -> Call:
    """``ModelEmaV3``, which rounds at random where the average is bfloat16."""
    utils = timm_utils()
    peer = utils.ModelEmaV3(model, decay=DECAY, dtype=dtype, stochastic_rounding=by_chance)
    return lambda: peer.update(model)


UPDATES: dict[str, Callable[..., Call]] = {
    "ema": lambda model, dtype=None: ours(model, dtype=dtype).call,
    "AveragedModel": averaged_model,
    "ema-pytorch": partial(ema_pytorch_update, foreach=False),
    "ema-pytorch foreach": partial(ema_pytorch_update, foreach=True),
    "torch-ema": torch_ema_update,
    "diffusers": partial(diffusers_update, foreach=False),
    "diffusers foreach": partial(diffusers_update, foreach=True),
    "timm": timm,
}
SWAPS: dict[str, Callable[[nn.Module], Call]] = {
    "ema": partial(ema_swap, assign=False),
    "ema assign": partial(ema_swap, assign=True),
    "torch-ema": torch_ema_swap,
    "diffusers": partial(diffusers_swap, foreach=False),
    "diffusers foreach": partial(diffusers_swap, foreach=True),
}
FOREACH = {name for name in UPDATES if name.endswith("foreach")}
ONE_BY_ONE = {name.removesuffix(" foreach") for name in FOREACH}


def updates(
    model: nn.Module, dtype: torch.dtype | None = None, *, without: Collection[str] = ()
) -> list[Contender]:
    """One update of the average of ``model`` by ours and by the peers."""
    return [
        Contender(name, make(model, dtype), kind=kind(name))
        for name, make in UPDATES.items()
        if name not in without
    ]


def swaps(model: nn.Module) -> list[Contender]:
    """The average into ``model`` and the live weights back."""
    return [Contender(name, make(model), kind=kind(name)) for name, make in SWAPS.items()]


def kind(name: str) -> str:
    """Whether an update or a swap of this name is ours."""
    return "ours" if name in {"ema", "ema assign"} else "peer"
