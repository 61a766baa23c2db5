"""Engines that leave nothing to average where it is are refused, with what to use instead."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ema import ModelError
from ema.torch_backend import EMAModel


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_fsdp1_is_refused(alone, use_orig_params, inner):
    """With flattened and with original parameters, wrapped as a whole or in part."""
    layer = FullyShardedDataParallel(
        nn.Linear(3, 3), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    model = nn.Sequential(layer, nn.Linear(3, 3)) if inner else layer
    with pytest.raises(ModelError, match=r"FSDP version 1.*: use fully_shard"):
        EMAModel(model)


def partition(parameter):
    """What ``deepspeed.zero.Init`` leaves of a parameter (partition_parameters.py)."""
    parameter.ds_id = 0
    parameter.ds_shape = parameter.shape
    parameter.ds_numel = parameter.numel()
    parameter.ds_tensor = parameter.detach().flatten().clone()
    parameter.data = torch.empty(0)


def test_zero_3_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    partition(model[1].weight)
    with pytest.raises(ModelError, match=r"`1\.weight` is partitioned by DeepSpeed ZeRO-3"):
        EMAModel(model)


def test_zero_3_is_refused_where_it_comes_later():
    """An average that began with whole parameters does not go on with empty ones."""
    model = nn.Linear(3, 3)
    average = EMAModel(model)
    for parameter in model.parameters():
        partition(parameter)
    with pytest.raises(ModelError, match="ZeRO-3"):
        average.update()
