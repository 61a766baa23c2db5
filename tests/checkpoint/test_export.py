"""Averages for those who do not have this library, and through PyTorch's own checkpoints."""

from __future__ import annotations

import sys

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, quantize_

from ema import CheckpointError, EMAModel, ModelError
from tests import processes


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
    result = processes.run([sys.executable, "-c", code])
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
    with pytest.raises(CheckpointError, match="`0` is C128, which safetensors lacks"):
        EMAModel(wide).export(tmp_path / "m.safetensors")
    hidden = nn.Linear(1, 1)
    hidden.register_state_dict_post_hook(lambda _module, state, *_: state.__delitem__("bias"))
    with pytest.raises(ModelError, match="lacks averaged tensors: `bias`"):
        EMAModel(hidden).export(tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def quantized_base():
    """A frozen linear layer of torchao, whose weight is a wrapper of two tensors, and a head."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8).requires_grad_(requires_grad=False), nn.Linear(8, 2))
    quantize_(net[0], Float8WeightOnlyConfig())
    return net


def test_an_export_of_a_quantized_base_is_refused_with_two_ways_that_work(tmp_path):
    """And leaves no file; the other ways carry the whole model and the average alone."""
    net, batch = quantized_base(), torch.randn(3, 16)
    ema_model = EMAModel(net, 0.5)
    with torch.no_grad():
        net[1].weight.add_(1.0)
    ema_model.update()
    message = (
        r"safetensors does not hold `0.weight` \(Float8Tensor\): save\(\) writes the averages"
        r" alone, torch.save\(ema_model.averaged_state_dict\(\), path\) everything"
    )
    with pytest.raises(CheckpointError, match=message):
        ema_model.export(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
    with ema_model.use_ema():
        expected = net(batch)
    torch.save(ema_model.averaged_state_dict(), tmp_path / "model.pt")
    whole = quantized_base()
    whole.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(whole(batch), expected)
    ema_model.save(tmp_path)
    resumed = EMAModel(quantized_base(), 0.5)
    resumed.load(tmp_path)
    with resumed.use_ema():
        assert torch.equal(resumed.model(batch), expected)


def test_the_state_dict_of_a_quantized_base_shares_no_memory_with_it():
    net = quantized_base()
    copied = EMAModel(net, 0.5).averaged_state_dict()["0.weight"]
    assert type(copied) is type(net[0].weight)
    assert copied.qdata.data_ptr() != net[0].weight.qdata.data_ptr()


def test_what_is_on_the_meta_device_is_named_in_place_of_an_empty_file(tmp_path):
    """Wholly, as offloading leaves a model, and in part."""
    whole = nn.Linear(4, 2, device="meta")
    with pytest.raises(ModelError, match="`weight`, `bias` are on the meta device"):
        EMAModel(whole).averaged_state_dict()
    with pytest.raises(ModelError, match="`weight`, `bias` are on the meta device"):
        EMAModel(whole).export(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="no average to write: `weight`, `bias` stayed on"):
        EMAModel(whole).save(tmp_path / "ema.safetensors")
    part = nn.Sequential(nn.Linear(4, 2, device="meta").requires_grad_(False), nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"`0.weight`, `0.bias` are on the meta device"):
        EMAModel(part).export(tmp_path / "m.safetensors")
    part[1].register_buffer("mask", torch.ones(2, device="meta"), persistent=False)
    assert list(tmp_path.iterdir()) == []
    EMAModel(part).save(tmp_path)  # the averages alone, which have values
    with pytest.raises(ModelError, match=r"`weight`, `bias` are in a lazy module"):
        EMAModel(nn.LazyLinear(2)).export(tmp_path / "m.safetensors")


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
