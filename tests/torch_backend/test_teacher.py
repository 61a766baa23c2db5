"""Calling an EMAModel: the averaged weights, and nothing else touched."""

import pytest
import torch
from torch import nn

from ema.torch_backend import EMAModel


def test_the_output_is_that_of_the_swapped_model(model, step):
    ema_model = EMAModel(model, 0.5)
    for _ in range(3):
        step(model)
        ema_model.update()
    model.eval()
    x = torch.randn(5, 4)
    with ema_model.use_ema():
        expected = model(x)
        assert torch.equal(ema_model(x), expected)
    assert torch.equal(ema_model(x), expected)
    assert not torch.equal(model(x), expected)


def test_the_live_model_is_left_alone(model, values, assert_same, step):
    """Neither weights nor gradients nor BatchNorm statistics change in training mode."""
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    before = values(model)
    x = torch.randn(5, 4, requires_grad=True)
    ema_model(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in model.parameters())
    assert_same(values(model), before)
    assert_same(dict(model.named_buffers()), buffers)


def test_excluded_and_frozen_weights_are_the_live_ones(model, step):
    model.second.requires_grad_(requires_grad=False)
    ema_model = EMAModel(model, 0.5, exclude="norm.*")
    model.eval()
    x = torch.randn(5, 4)
    assert torch.equal(ema_model(x), model(x))
    (ema_model(x).sum() * 1).detach()
    assert not ema_model(x).requires_grad


@pytest.mark.parametrize("separate", [False, True], ids=["one parameter", "one storage"])
def test_tied_weights_are_tied_in_the_teacher(step, separate):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data.t()) if separate else model[0].weight
    ema_model = EMAModel(model, 0.5)
    with torch.no_grad():
        model[0].weight.add_(1)
    ema_model.update()
    x = torch.randn(2, 3)
    with ema_model.use_ema():
        expected = model(x)
    assert torch.equal(ema_model(x), expected)


def test_weights_that_are_tied_and_in_a_shared_module():
    """As in an encoder and a decoder that share their embeddings, and a head tied to those."""
    model = nn.Module()
    model.embedding = nn.Embedding(5, 3)
    model.inner = nn.Module()
    model.inner.embedding = model.embedding
    model.head = nn.Linear(3, 5, bias=False)
    model.head.weight = model.embedding.weight
    model.forward = lambda x: model.head(model.inner.embedding(x) + model.embedding(x))
    ema_model = EMAModel(model, 0.5)
    with torch.no_grad():
        model.head.weight.add_(1)
    ema_model.update()
    x = torch.arange(5)
    with ema_model.use_ema():
        expected = model(x)
    assert torch.equal(ema_model(x), expected)
    assert not torch.equal(model(x), expected)


def test_a_shared_module_has_its_live_weights_after_a_call(step, values, assert_same):
    """``functional_call`` alone would leave the averages in it for good."""
    model = nn.Module()
    model.embedding = nn.Embedding(5, 3)
    model.encoder = nn.Sequential(model.embedding)
    model.forward = lambda x: model.encoder(x) + model.embedding(x)
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    live, before = model.embedding.weight, values(model)
    ema_model(torch.arange(5))
    assert model.embedding.weight is live
    assert_same(values(model), before)


def test_weights_with_gaps_that_share_their_memory_are_tied_in_the_teacher():
    model = nn.Module()
    model.first, model.second = nn.Embedding(5, 3), nn.Embedding(5, 3)
    model.first.weight = nn.Parameter(torch.randn(5, 6)[:, ::2])
    model.second.weight = nn.Parameter(model.first.weight.data)
    model.forward = lambda x: model.first(x) * 2 + model.second(x)
    ema_model = EMAModel(model, 0.5)
    with torch.no_grad():
        model.first.weight.add_(1)
    ema_model.update()
    x = torch.arange(5)
    with ema_model.use_ema():
        expected = model(x)
    assert torch.equal(ema_model(x), expected)
    assert not torch.equal(model(x), expected)


def test_half_precision_weights_are_cast(model, step):
    model.bfloat16()
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    model.eval()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    with ema_model.use_ema():
        expected = model(x)
    assert torch.equal(ema_model(x), expected)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_called_bare(model, step, wrap):
    ema_model = EMAModel(wrap(model), 0.5)
    step(model)
    ema_model.update()
    model.eval()
    x = torch.randn(2, 4)
    with ema_model.use_ema():
        expected = model(x)
    assert torch.equal(ema_model(x), expected)


def test_backward_through_a_teacher_that_an_update_has_changed_is_loud(model, step):
    """A graph that has saved the averages is not used with others."""
    ema_model = EMAModel(model, 0.5)
    loss = ema_model(torch.randn(8, 4, requires_grad=True)).sum()
    step(model)
    ema_model.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
