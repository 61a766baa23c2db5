"""What is made without a word about devices is made where it belongs, whatever the default is."""

import sys

from tests import processes

CODE = """
import sys, torch
from torch import nn
from ema import EMAModel
from ema.torch_backend import batch_norm
from ema.torch_backend.update import prepared
from ema.torch_backend.gpu import offload

folder = sys.argv[1]
model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
prepared._is_offloaded, behind = lambda entry: True, prepared._is_offloaded
torch.set_default_device("meta")
for offloaded in (True, False):
    prepared._is_offloaded = (lambda entry: True) if offloaded else behind
    for how in ({}, {"compensated": True}, {"dtype": torch.bfloat16}, {"on_nonfinite": "skip"},
                {"on_nonfinite": "raise"}, {"buffers": "average"}):
        one = EMAModel(model, 0.9, **how)
        one.update()
        one.update()
        with one.use_ema():
            pass
        one.copy_to(model)
        one.save(folder)
        one.load(folder)
        one.load_state_dict(one.state_dict())
        one.relative_distance()
        assert one.count == 2
        devices = {tensor.device.type for tensor in one.averaged_parameters().values()}
        assert devices == {"cpu"}, devices
"""


def test_averages_do_not_ask_for_the_default_device(tmp_path):
    command = [sys.executable, "-c", CODE, str(tmp_path / "average.safetensors")]
    processes.run(command)
