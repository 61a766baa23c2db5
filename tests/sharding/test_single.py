"""Who trains in one process pays nothing for shards."""

import sys

import pytest

from tests import processes


def test_one_process_does_not_load_what_shards_are_made_of():
    """Not by averaging, swapping, saving or checking ranks."""
    code = """
import sys, tempfile, torch
from ema.torch_backend import EMAModel
ema_model = EMAModel(torch.nn.Linear(2, 2), 0.9)
ema_model.update()
with ema_model.use_ema():
    pass
folder = tempfile.mkdtemp()
ema_model.save(folder)
ema_model.load(folder)
ema_model.relative_distance()
ema_model.verify_ranks()
assert not ema_model.sharded
assert ema_model.averaged_state_dict().keys() == {"weight", "bias"}
print([name for name in ("torch.distributed.tensor", "torch.distributed.fsdp") if name in sys.modules])
"""
    result = processes.run([sys.executable, "-c", code])
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_next_gather_waits_for_the_swap_and_not_for_an_older_event(tmp_path):
    """An event of the user's that was recorded after the optimizer's step."""
    code = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from ema.torch_backend import EMAModel

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
fully_shard(model[0], mesh=torch.distributed.init_device_mesh("cpu", (1,)))
fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
model(torch.ones(1, 4))
ema_model = EMAModel(model, 0.9)
context = model._get_fsdp_state()._state_ctx

def forgotten():
    return context.post_optim_event is None

model.set_post_optim_event(torch.Event("cpu"))
ema_model.update()
assert not forgotten()  # an update writes no shard
with ema_model.use_ema():
    assert forgotten()
    model.set_post_optim_event(torch.Event("cpu"))
assert forgotten()
model.set_post_optim_event(torch.Event("cpu"))
ema_model.copy_to(model)
assert forgotten()
model(torch.ones(1, 4))
dist.destroy_process_group()
"""
    processes.run([sys.executable, "-c", code, tmp_path])
