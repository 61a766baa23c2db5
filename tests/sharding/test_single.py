"""Who trains in one process pays nothing for shards."""

import subprocess
import sys


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
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
