"""Frozen quantized weights beside averaged ones: float8, torchao, and integers with hidden scales."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

from ema import ModelError
from ema.torch_backend import EMAModel


class Float8Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight.float(), self.bias)


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 8).requires_grad_(requires_grad=False), nn.Linear(8, 2))


def torchao(config):
    def make(seed=0):
        net = plain(seed)
        quantize_(net[0], config())
        return net

    return make


def float8(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(Float8Linear(32, 8).requires_grad_(requires_grad=False), nn.Linear(8, 2))
    net[0].weight.data = net[0].weight.data.to(torch.float8_e4m3fn)
    return net


BASES = {
    "float8": float8,
    "Int8WeightOnly": torchao(Int8WeightOnlyConfig),
    "Int8DynamicActivation": torchao(Int8DynamicActivationInt8WeightConfig),
    "Float8WeightOnly": torchao(Float8WeightOnlyConfig),
    "IntxWeightOnly": torchao(IntxWeightOnlyConfig),
}


def trained(make):
    net = make()
    ema_model = EMAModel(net, 0.5)
    for _ in range(2):
        with torch.no_grad():
            net[1].weight.add_(1.0)
        ema_model.update()
    return net, ema_model


@pytest.mark.parametrize("base", BASES)
def test_a_frozen_quantized_base_is_copied_with_the_averages(base):
    """Into a model of another base of the same kind, and into the live one; everything else works too."""
    net, ema_model = trained(BASES[base])
    batch = torch.randn(3, 32)
    assert set(ema_model.averaged_parameters()) == {"1.weight", "1.bias"}
    with ema_model.use_ema():
        expected = net(batch)
    other = BASES[base](seed=1)
    ema_model.copy_to(other)
    assert torch.equal(other(batch), expected)
    before = other[0].weight
    with ema_model.use_ema(other):
        assert torch.equal(other(batch), expected)
    assert other[0].weight is before
    assert torch.equal(ema_model(batch), expected)
    ema_model.load_state_dict(ema_model.state_dict())
    copied = copy.deepcopy(ema_model)
    copied.copy_to(copied.model)
    assert torch.equal(copied.model(batch), expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Int8WeightOnly", "plain"),
        ("plain", "Int8WeightOnly"),
        ("Int8WeightOnly", "Float8WeightOnly"),
        ("Int8WeightOnly", "Int8DynamicActivation"),
    ],
)
def test_a_base_that_is_quantized_otherwise_is_refused_with_a_way_out(ours, theirs):
    """Nothing has changed then, and what the message names writes the averages."""
    bases = {**BASES, "plain": plain}
    _, ema_model = trained(bases[ours])
    other = bases[theirs](seed=1)
    batch = torch.randn(3, 32)
    before = other(batch)
    message = (
        r"`0.weight` is an? \w+, here it is an? \w+, quantized otherwise; other.load_state_dict"
    )
    with pytest.raises(ModelError, match=message):
        ema_model.copy_to(other)
    assert torch.equal(other(batch), before)
    other.load_state_dict(ema_model.averaged_parameters(), strict=False)
    assert torch.equal(other[1].weight, ema_model.averaged_parameters()["1.weight"])


class Packed(nn.Parameter):
    """Integers whose scale only the class knows, as those of bitsandbytes."""


def packed(scale, values):
    net = plain()
    net[0].weight = Packed(torch.tensor(values, dtype=torch.int8), requires_grad=False)
    net[0].weight.scale = scale
    return net


def test_packed_integers_are_never_copied_without_their_scales():
    """Where the values are the same there is nothing to copy."""
    ema_model = EMAModel(packed(2.0, [1, 2]), 0.5)
    same, other = packed(2.0, [1, 2]), packed(3.0, [2, 1])
    with torch.no_grad():
        same[1].bias.fill_(7.0)
    ema_model.copy_to(same)
    assert torch.equal(same[1].bias, ema_model.averaged_parameters()["1.bias"])
    before = copy.deepcopy(other)
    with pytest.raises(ModelError, match="is a Packed of other values than here, which mean noth"):
        ema_model.copy_to(other)
    assert all(map(torch.equal, other.parameters(), before.parameters()))


def test_an_expanded_buffer_is_left_alone_where_it_holds_the_same():
    """It cannot be written; a copied model used to be refused for it."""
    net = plain()
    net.register_buffer("ones", torch.ones(1).expand(4))
    ema_model, other = EMAModel(net, 0.5), copy.deepcopy(net)
    with torch.no_grad():
        other[1].bias.fill_(7.0)
    other.ones = torch.ones(1).expand(4)
    ema_model.copy_to(other)
    assert torch.equal(other[1].bias, net[1].bias)
    other.ones = torch.zeros(1).expand(4)
    with pytest.raises(ModelError, match="`ones` repeats its elements, and holds other values"):
        ema_model.copy_to(other)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_float8_that_would_be_averaged_is_refused(dtype):
    """By name, and with what to do; frozen or excluded it stays as it is."""
    net = plain()
    net[0].weight.data = torch.ones(8, 32).to(dtype)
    net.register_buffer("scale", torch.ones(2).to(dtype))
    assert set(EMAModel(net).averaged_parameters()) == {"1.weight", "1.bias"}
    with pytest.raises(ModelError, match=rf"`0.weight` is {dtype}, in which .*: exclude it$"):
        EMAModel(net, include="0.*")
    with pytest.raises(ModelError, match=r"`scale` .*: give it a rule .*\{'scale': 'copy'"):
        EMAModel(net, buffers="average")
    EMAModel(net, buffers={"scale": "copy", "*": "average"}).update()
    net[0].weight.requires_grad_()
    with pytest.raises(ModelError, match=r"`0.weight` is torch.float8"):
        EMAModel(net)
    EMAModel(net, exclude="0.*").update()


def test_a_parameter_that_becomes_float8_is_refused_and_nothing_moves():
    net = plain()
    ema_model = EMAModel(net, 0.5)
    before = ema_model.state_dict()
    with torch.no_grad():
        net[1].bias.add_(1.0)
    net[1].weight.data = net[1].weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"`1.weight` is torch.float8_e4m3fn"):
        ema_model.update()
    net[1].weight.data = net[1].weight.data.float()
    after = ema_model.state_dict()
    assert after["step"] == before["step"] == 0
    assert all(torch.equal(after["averages"][n], a) for n, a in before["averages"].items())


def test_averages_can_be_lent_to_a_model_in_float8():
    """It is only written then."""
    net = plain()
    ema_model, other = EMAModel(net, 0.5), plain(seed=1)
    other[1].weight.data = other[1].weight.data.to(torch.float8_e4m3fn)
    with ema_model.use_ema(other):
        assert other[1].weight.dtype == torch.float8_e4m3fn
        assert torch.equal(other[1].weight.float(), net[1].weight.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("options", [{}, {"exclude": "0.*"}, {"include": "1.*"}])
def test_a_quantized_weight_that_requires_grad_is_excluded_for_every_call(options):
    """A model that is written into is not asked what it would average itself."""
    net = torchao(Int8WeightOnlyConfig)()
    net[0].weight.requires_grad_()
    if not options:
        with pytest.raises(ModelError, match=r"`0.weight` is an Int8Tensor without memory"):
            EMAModel(net)
        return
    ema_model, other = EMAModel(net, 0.5, **options), copy.deepcopy(net)
    with torch.no_grad():
        other[1].bias.fill_(7.0)
    with ema_model.use_ema(other):
        assert torch.equal(other[1].bias, net[1].bias)
    ema_model.copy_to(other)
    assert torch.equal(other[1].bias, net[1].bias)


def test_tensors_on_the_meta_device_are_named_on_either_side():
    net = plain()
    ema_model, other = EMAModel(net, 0.5), plain(seed=1)
    bias = other[1].bias.detach().clone()
    other[0].to("meta")
    with pytest.raises(ModelError, match=r"`0.weight` is on the meta device.*`0.bias` is on"):
        ema_model.copy_to(other)
    assert torch.equal(other[1].bias, bias)
    net[0].to("meta")
    with pytest.raises(ModelError, match=r"`0.weight` is here on the meta device"):
        ema_model.copy_to(plain(seed=1))
    net[1].to("meta")
    with pytest.raises(ModelError, match=r"`1.weight` is on the meta device"):
        ema_model.update()
    assert ema_model.step == 0


KINDS = (torch.float32, torch.bfloat16, torch.int8, torch.int32, torch.float8_e4m3fn)


@pytest.mark.parametrize("ours", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
def test_frozen_weights_are_not_cast_to_or_from_quantized_ones(ours, theirs):
    """A cast would cut off fractions or forget a scale; only widths of real numbers may differ."""

    def make(dtype):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        net[0].weight = nn.Parameter(torch.full((4, 4), 2.0).to(dtype), requires_grad=False)
        return net

    source, target = make(ours), make(theirs)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    wide = {torch.float32, torch.bfloat16}
    if ours == theirs or {ours, theirs} <= wide:
        EMAModel(source).copy_to(target)
        assert torch.equal(target[1].weight, source[1].weight)
        return
    with pytest.raises(ModelError, match=r"`0.weight` is torch\.\w+, here it is torch\.\w+, quant"):
        EMAModel(source).copy_to(target)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor.float(), before[name].float()), name
