"""Ours and the peers on PyTorch, each with a constant decay, as the contenders of a case.

A new peer is one function ``(model, dtype) -> Average`` here and its line in ``AVERAGES``. ``dtype`` is
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
from typing import Any, NamedTuple

import ema_pytorch
import torch
import torch_ema
from diffusers import training_utils
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from benchmarks.setting import DECAY
from benchmarks.timing import Contender
from ema.torch_backend import EMAModel

__all__ = ["AVERAGES", "FOREACH", "ONE_BY_ONE", "SWAPS", "UPDATES", "kind", "ours", "swap_of"]
__all__ += ["swaps", "timm_average", "timm_utils", "update_of", "updates"]

Call = Callable[[], object]
STUBS = ("torchvision", "torchvision.ops", "torchvision.ops.misc")


class Average(NamedTuple):
    """An update of an average, and a swap of it into the model and back, if the package has one."""

    update: Call
    swap: Any = None


def ema_average(
    model: nn.Module, dtype: torch.dtype | None = None, *, assign: bool = False
) -> Average:
    average = EMAModel(model, DECAY, dtype=dtype)
    return Average(average.update, lambda: enter_and_exit(average.use_ema(assign=assign)))


def enter_and_exit(block: AbstractContextManager[object]) -> None:
    with block:
        pass


def averaged_model(model: nn.Module, dtype: torch.dtype | None = None) -> Average:
    """Its grouped function refuses two dtypes, the other one promotes."""
    if dtype is None:
        peer = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    else:
        peer = AveragedModel(model, avg_fn=get_ema_avg_fn(DECAY)).to(dtype)
    return Average(lambda: peer.update_parameters(model))


def ema_pytorch_average(
    model: nn.Module, dtype: torch.dtype | None = None, *, foreach: bool
) -> Average:
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
    return Average(peer.update)


def torch_ema_average(model: nn.Module, dtype: torch.dtype | None = None) -> Average:
    peer = torch_ema.ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates=False)
    peer.to(dtype=dtype)
    return Average(
        lambda: peer.update(model.parameters()),
        lambda: enter_and_exit(peer.average_parameters(model.parameters())),
    )


def diffusers_average(
    model: nn.Module, dtype: torch.dtype | None = None, *, foreach: bool
) -> Average:
    params = model.parameters()
    peer = training_utils.EMAModel(params, decay=DECAY, min_decay=DECAY, foreach=foreach)
    peer.to(dtype=dtype)

    def swap() -> None:
        peer.store(model.parameters())
        peer.copy_to(model.parameters())
        peer.restore(model.parameters())

    return Average(lambda: peer.step(model.parameters()), swap)


@functools.cache
def timm_utils() -> ModuleType:
    """The real ``timm.utils``, also on a machine without torchvision.

    timm requires torchvision, whose wheels require a torch of their own, so the Makefile installs
    timm without its requirements, and ``timm/__init__.py`` does not run here. ``timm.utils`` needs
    one class of torchvision, to recognize layers that no model here has: an empty class.

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


def timm_average(
    model: nn.Module, dtype: torch.dtype | None = None, *, by_chance: bool = True
) -> Average:
    """``ModelEmaV3``, which rounds at random where the average is bfloat16."""
    utils = timm_utils()
    peer = utils.ModelEmaV3(model, decay=DECAY, dtype=dtype, stochastic_rounding=by_chance)
    return Average(lambda: peer.update(model))


AVERAGES: dict[str, Callable[..., Average]] = {
    "ema": ema_average,
    "ema assign": partial(ema_average, assign=True),
    "AveragedModel": averaged_model,
    "ema-pytorch": partial(ema_pytorch_average, foreach=False),
    "ema-pytorch foreach": partial(ema_pytorch_average, foreach=True),
    "torch-ema": torch_ema_average,
    "diffusers": partial(diffusers_average, foreach=False),
    "diffusers foreach": partial(diffusers_average, foreach=True),
    "timm": timm_average,
}
SWAPS = ["ema", "ema assign", "torch-ema", "diffusers", "diffusers foreach"]
UPDATES = [name for name in AVERAGES if name != "ema assign"]
FOREACH = {name for name in UPDATES if name.endswith("foreach")}
ONE_BY_ONE = {name.removesuffix(" foreach") for name in FOREACH}


def update_of(name: str, model: nn.Module) -> Call:
    return AVERAGES[name](model).update


def swap_of(name: str, model: nn.Module) -> Call:
    swap: Call = AVERAGES[name](model).swap
    return swap


def kind(name: str) -> str:
    """Whether an average of this name is ours."""
    return "ours" if name in {"ema", "ema assign"} else "peer"


def updates(
    model: nn.Module, dtype: torch.dtype | None = None, *, without: Collection[str] = ()
) -> list[Contender]:
    """One update of the average of ``model`` by ours and by the peers."""
    names = [name for name in UPDATES if name not in without]
    return [Contender(name, AVERAGES[name](model, dtype).update, kind=kind(name)) for name in names]


def swaps(model: nn.Module) -> list[Contender]:
    """The average into ``model`` and the live weights back."""
    return [Contender(name, swap_of(name, model), kind=kind(name)) for name in SWAPS]


def ours(
    model: nn.Module, name: str = "ema", *, traffic: int | None = None, **options: Any
) -> Contender:
    """One update by ``EMAModel`` with options."""
    update = EMAModel(model, DECAY, **options).update
    return Contender(name, update, kind="ours", traffic=traffic)
