"""Averages for those who do not have this library, and through PyTorch's own checkpoints."""

from __future__ import annotations

import subprocess
import sys

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ema import CheckpointError, EMAModel, ModelError


class Tied(nn.Module):
    """A frozen parameter, one in bfloat16, tied ones, a BatchNorm and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.narrow = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = Tied()
    ema_model = EMAModel(model, 0.9)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema_model.update()
    return model, ema_model


def test_an_export_is_a_complete_state_dict(tmp_path, pair):
    model, ema_model = pair
    file = ema_model.export(tmp_path / "model.safetensors")
    with ema_model.use_ema():
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        inside = ema_model.export(tmp_path / "inside.safetensors")
    found = safetensors.torch.load_file(file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert inside.read_bytes() == file.read_bytes()


def test_an_export_is_read_where_this_library_is_not(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema_model = EMAModel(torch.compile(model), 0.9)
    file = ema_model.export(tmp_path / "model.safetensors")
    code = (
        "import sys; sys.modules['ema'] = None\n"
        "import torch; from torch import nn; from safetensors.torch import load_file\n"
        "model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))\n"
        f"print(model.load_state_dict(load_file({str(file)!r})))\n"
        "print(model[0].weight.sum().item())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    message, total = result.stdout.splitlines()
    assert message == "<All keys matched successfully>"
    assert float(total) == model[0].weight.sum().item()


def test_an_export_of_transformers_is_read_by_from_pretrained(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    ema_model = EMAModel(model, 0.9)
    config.save_pretrained(tmp_path)
    ema_model.export(tmp_path / "model.safetensors")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_what_cannot_be_exported_is_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ModelError, match="`_extra_state` is a dict, only tensors can be exported"):
        EMAModel(Extra(1, 1)).export(tmp_path / "m.safetensors")
    wide = nn.ParameterList([nn.Parameter(torch.randn(1, dtype=torch.complex128))])
    with pytest.raises(CheckpointError, match="`0` is C128, which safetensors does not have"):
        EMAModel(wide).export(tmp_path / "m.safetensors")
    hidden = nn.Linear(1, 1)
    hidden.register_state_dict_post_hook(lambda _module, state, *_: state.__delitem__("bias"))
    with pytest.raises(ModelError, match="lacks what is averaged: `bias`"):
        EMAModel(hidden).export(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")
def test_torch_distributed_checkpoint_carries_the_state(tmp_path, pair):
    model, ema_model = pair
    dcp.save({"model": model.state_dict(), "ema": ema_model.state_dict()}, checkpoint_id=tmp_path)
    resumed = EMAModel(Tied(), 0.9)
    state = {"ema": resumed.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    resumed.load_state_dict(state["ema"])
    assert (resumed.step, resumed.count) == (3, 3)
    for name, average in ema_model.averaged_parameters().items():
        assert torch.equal(resumed.averaged_parameters()[name], average)
