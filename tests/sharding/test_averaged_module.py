"""Modules that averaged_module() makes of models that are spread over processes, or may be."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ema import ModelError
from ema.torch_backend import EMAModel

INPUTS = torch.ones(2, 4)


def assert_follows(ema_model, module):
    for _ in range(2):
        with torch.no_grad():
            for parameter in ema_model.model.parameters():
                parameter.add_(0.1)
        ema_model.update()
        with ema_model.use_ema():
            expected = ema_model.model(INPUTS)
            assert torch.equal(module(INPUTS), expected)
        assert torch.equal(module(INPUTS), expected)
        assert not torch.equal(ema_model.model(INPUTS), expected)


def test_under_tensor_parallelism_it_holds_shards_of_its_own(alone):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    model = parallelize_module(model, init_device_mesh("cpu", (1,)), plan)
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    assert_follows(ema_model, module)


def test_under_ddp_it_is_a_copy_of_the_bare_model(alone):
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 4)))
    ema_model = EMAModel(model, 0.5)
    module = ema_model.averaged_module()
    assert type(module) is nn.Sequential
    assert_follows(ema_model, module)


def test_what_a_wrapper_inside_the_model_holds_is_named(alone):
    """DistributedDataParallel has a process group, which cannot be copied."""
    model = nn.Sequential(nn.parallel.DistributedDataParallel(nn.Linear(4, 4)))
    with pytest.raises(ModelError, match=r"`0\.\w+` is a \w+ that cannot be copied"):
        EMAModel(model, 0.5).averaged_module()


def test_under_fully_shard_it_is_refused(alone):
    model = nn.Sequential(nn.Linear(4, 4))
    fully_shard(model)
    with pytest.raises(ModelError, match="under fully_shard a module cannot be copied"):
        EMAModel(model, 0.5).averaged_module()
