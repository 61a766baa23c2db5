"""Calling an EMAModel: the averaged weights, and nothing else touched."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from ema import ModelError
from ema.torch_backend import EMAModel
from tests.torch_helpers import assert_same, step, values


def test_the_output_is_that_of_the_swapped_model(model):
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


def test_the_live_model_is_left_alone(model):
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


def test_excluded_and_frozen_weights_are_the_live_ones(model):
    model.second.requires_grad_(requires_grad=False)
    ema_model = EMAModel(model, 0.5, exclude="norm.*")
    model.eval()
    x = torch.randn(5, 4)
    assert torch.equal(ema_model(x), model(x))
    (ema_model(x).sum() * 1).detach()
    assert not ema_model(x).requires_grad


@pytest.mark.parametrize("separate", [False, True], ids=["one parameter", "one storage"])
def test_tied_weights_are_tied_in_the_teacher(separate):
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


def test_a_shared_module_has_its_live_weights_after_a_call():
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


def test_half_precision_weights_are_cast(model):
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
def test_a_wrapped_model_is_called_bare(model, wrap):
    ema_model = EMAModel(wrap(model), 0.5)
    step(model)
    ema_model.update()
    model.eval()
    x = torch.randn(2, 4)
    with ema_model.use_ema():
        expected = model(x)
    assert torch.equal(ema_model(x), expected)


def test_backward_through_a_teacher_that_an_update_has_changed_is_loud(model):
    """A graph that has saved the averages is not used with others."""
    ema_model = EMAModel(model, 0.5)
    loss = ema_model(torch.randn(8, 4, requires_grad=True)).sum()
    step(model)
    ema_model.update()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Gate(nn.Module):
    """Leaves traces of every kind: a loss, a counter, replaced and new buffers, an attribute."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("cache", None)

    def forward(self, x, *, fail=False):
        shares = self.linear(x).softmax(-1)
        self.calls += 1
        self.loss = shares.mean(0).square().sum()
        self.total = self.total + 1
        self.cache = x
        if not hasattr(self, "first"):
            self.first = x
            self.register_buffer("later", x.clone())
            self.child = nn.Identity()
        if fail:
            raise ValueError("as asked")
        return x * shares


@pytest.mark.parametrize("fail", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after the student"])
def test_attributes_that_forward_assigns_are_as_before(fail, ran):
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"gate": Gate()}))
    model.forward = lambda x, **options: model[1]["gate"](model[0](x), **options)
    ema_model = EMAModel(model, 0.5)
    if ran:
        model(torch.randn(2, 4))
    gate = model[1]["gate"]
    holders = (vars(gate), gate._buffers, gate._parameters, gate._modules)
    before = [dict(holder) for holder in holders]
    with pytest.raises(ValueError, match="as asked") if fail else contextlib.nullcontext():
        ema_model(torch.randn(3, 4), fail=fail)
    for holder, kept in zip(holders, before, strict=True):
        assert holder.keys() == kept.keys()
        assert all(holder[key] is value for key, value in kept.items())
    assert gate.calls == ran


def test_a_loss_that_forward_keeps_is_still_that_of_the_student():
    model = Gate()
    ema_model = EMAModel(model, 0.5)
    x = torch.randn(8, 4)
    gradients = []
    for teach in (False, True):
        out = model(x)
        target = ema_model(x) if teach else torch.zeros(8, 4)
        ((out - target.detach()) * 0).sum().add(model.loss).backward()
        gradients.append(model.linear.weight.grad.clone())
        model.zero_grad()
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_a_teacher_uses_the_buffers_that_the_model_has_now():
    """A buffer that forward replaces is another tensor than when the model was looked at."""
    model = Gate()
    model.forward = lambda x: model.linear(x) * model.total
    ema_model = EMAModel(model, 0.5)
    ema_model.update()
    model.total = torch.full((), 3.0)
    x, other = torch.randn(2, 4), Gate()
    assert torch.equal(ema_model(x), model.linear(x) * 3)
    ema_model.copy_to(other)
    assert other.total == 3


def pruned():
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", 0.3)
    return layer


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make", [lambda: weight_norm(nn.Linear(4, 4)), pruned], ids=["old weight_norm", "pruning"]
)
def test_weights_that_a_hook_has_computed_stay_those_of_the_student(make):
    model = make()
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    x = torch.randn(2, 4)
    model(x)
    student = model.weight
    with ema_model.use_ema():
        expected = model(x)
    model.weight = student
    assert torch.equal(ema_model(x), expected)
    assert model.weight is student
    assert student.requires_grad


def test_the_list_of_weights_of_a_recurrent_layer_is_as_before():
    model = nn.LSTM(4, 6)
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    x = torch.randn(3, 5, 4)
    before = list(model._flat_weights)
    with ema_model.use_ema():
        expected = model(x)[0]
    assert torch.equal(ema_model(x)[0], expected)
    assert all(now is kept for now, kept in zip(model._flat_weights, before, strict=True))


def test_a_lazy_model_is_refused_until_it_has_run():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))
    ema_model = EMAModel(model, 0.5)
    with pytest.raises(ModelError, match=r"got no shape of `1\.weight`, `1\.bias` yet"):
        ema_model(torch.ones(1, 4))
    model(torch.ones(1, 4))
    assert torch.equal(ema_model(torch.ones(1, 4)), model(torch.ones(1, 4)))


@pytest.fixture(params=["weight_norm", "orthogonal"])
def parametrized(request):
    """A parametrized layer whose average is elsewhere, in a larger model, and an input."""
    layer = getattr(parametrizations, request.param)(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), layer)
    ema_model = EMAModel(model, 0.5)
    step(model)
    ema_model.update()
    return ema_model, torch.randn(3, 4)


def outputs(ema_model, x):
    """What the averaged and the live weights give, without a cache."""
    with ema_model.use_ema():
        averaged = ema_model.model(x)
    live = ema_model.model(x)
    assert not torch.equal(averaged, live)
    return averaged, live


def test_a_cache_of_parametrized_weights_is_not_shared_with_the_teacher(parametrized):
    ema_model, x = parametrized
    averaged, live = outputs(ema_model, x)
    with parametrize.cached():
        assert torch.equal(ema_model(x), averaged)
        assert torch.equal(ema_model.model(x), live)
        cached = dict(parametrize._cache)
        assert torch.equal(ema_model(x), averaged)
        assert parametrize._cache == cached
        assert torch.equal(ema_model.model(x), live)
    assert parametrize._cache == {}


def test_a_cache_of_parametrized_weights_does_not_survive_a_failing_teacher(parametrized):
    ema_model, x = parametrized
    _, live = outputs(ema_model, x)
    with parametrize.cached():
        ema_model.model(x)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            ema_model(x[:, :3])
        assert torch.equal(ema_model.model(x), live)


@pytest.mark.parametrize("assign", [False, True], ids=["values", "assign"])
def test_a_cache_of_parametrized_weights_does_not_survive_a_swap(parametrized, assign):
    """Neither way, wherever the cache begins and ends."""
    ema_model, x = parametrized
    averaged, live = outputs(ema_model, x)
    model = ema_model.model
    with parametrize.cached():
        for _ in range(2):
            assert torch.equal(model(x), live)
            with ema_model.use_ema(assign=assign):
                assert torch.equal(model(x), averaged)
    with contextlib.ExitStack() as cache:
        with ema_model.use_ema(assign=assign):
            cache.enter_context(parametrize.cached())
            assert torch.equal(model(x), averaged)
        assert torch.equal(model(x), live)


def test_a_cache_of_parametrized_weights_does_not_survive_copy_to(parametrized):
    ema_model, x = parametrized
    averaged, live = outputs(ema_model, x)
    model = ema_model.model
    with parametrize.cached():
        assert torch.equal(model(x), live)
        ema_model.copy_to(model)
        assert torch.equal(model(x), averaged)


class Packed(nn.Parameter):
    """A quantized weight whose scale only its own class knows, as in bitsandbytes."""

    scale = 3.0


def test_a_frozen_parameter_keeps_its_class():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = Packed(torch.ones(2), requires_grad=False)
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(x) * self.weight.scale

    model = Quantized()
    assert torch.equal(EMAModel(model)(torch.ones(1, 2)), model(torch.ones(1, 2)))


@pytest.mark.parametrize("after", [0, 10])
def test_what_forward_writes_in_place_reaches_neither_averages_nor_live_tensors(after):
    """Averaged statistics, buffers that count, and weights that an embedding shortens."""

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(3, 4, max_norm=1.0)
            self.frozen = nn.Embedding(3, 4, max_norm=1.0).requires_grad_(False)
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, indices):
            self.calls += 1
            return self.norm(self.embedding(indices) + self.frozen(indices))

    model = Writes()
    with torch.no_grad():
        model.embedding.weight.fill_(3.0)
        model.frozen.weight.fill_(3.0)
    average = EMAModel(model, 0.5, buffers="average", update_after_step=after)
    average.update()
    live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: value.clone() for name, value in average.averaged_parameters().items()}
    average(torch.tensor([0, 1, 2]))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name]), name
    for name, value in average.averaged_parameters().items():
        assert torch.equal(value, averages[name]), name


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused_with_the_ways_that_work():
    model = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    average = EMAModel(model, 0.5)
    with pytest.raises(ModelError, match=r"inside use_ema\(\), or call averaged_module\(\)"):
        average(torch.ones(1, 2))
    assert average.averaged_module()(torch.ones(1, 2)).shape == (1, 2)
