"""On a GPU: what runs beside the training step, what a graph holds, what the host waits for."""

import copy
import warnings

import pytest
import torch
from torch import nn

import ema
from ema import EMAModel
from ema.errors import StateError
from ema.torch_backend.gpu import kernels
from ema.torch_backend.swap import swap as swap_module
from tests.torch_backend.gpu.runs import differences, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SIZE = 1 << 24
"""Elements of a tensor whose update takes long enough for a race to be lost."""


def large():
    torch.manual_seed(0)
    return nn.ParameterList(
        [
            nn.Parameter(torch.randn(SIZE, device="cuda").to(d))
            for d in (torch.float32, torch.bfloat16)
        ]
    )


def run(model, average, optimizers, steps=12, before_update=lambda step: None):
    """Steps of which each writes all weights at once; nothing waits on the host."""
    for step in range(steps):
        for parameter in model:
            parameter.grad = torch.full_like(parameter, float(step % 5 - 2))
        for optimizer in optimizers:
            optimizer.step()
        before_update(step)
        average.update()
    torch.cuda.synchronize()
    return {name: tensor.clone() for name, tensor in average.averaged_parameters().items()}


def halves(model):
    return [torch.optim.SGD([parameter], 0.1) for parameter in model]


def whole(model):
    return [torch.optim.AdamW(model.parameters(), 0.1, fused=True)]


@pytest.mark.parametrize("optimizers", [halves, whole])
@pytest.mark.parametrize("options", [{}, {"on_nonfinite": "skip"}, {"compensated": True}], ids=str)
@pytest.mark.parametrize("where", [{"overlap": True}, {"device": "cpu"}], ids=str)
def test_what_runs_beside_the_step_has_the_bits_of_what_runs_in_it(optimizers, options, where):
    first, second = large(), large()
    here = run(first, EMAModel(first, 0.9, **options), optimizers(first))
    there = run(second, EMAModel(second, 0.9, **options, **where), optimizers(second))
    assert (
        differences(here, {name: tensor.to(here[name].device) for name, tensor in there.items()})
        == []
    )


def test_an_update_overlaps():
    """Two of them, at least: they are on another stream than the steps."""
    model = large()
    average = EMAModel(model, 0.9, overlap=True)
    run(model, average, whole(model), steps=3)
    side_stream = average._averages._bound.update._beside
    assert side_stream._streams
    assert all(done.query() for done in side_stream._done.values())


def test_loading_weights_between_an_update_and_the_next_step():
    first, second = large(), large()
    states = [copy.deepcopy(first.state_dict()) for _ in range(2)]
    results = []
    for model, how in ((first, {}), (second, {"overlap": True})):
        average = EMAModel(model, 0.9, **how)
        optimizers = whole(model)
        for _ in range(4):
            run(model, average, optimizers, steps=2)
            average.update()
            model.load_state_dict(states[0])
        torch.cuda.synchronize()
        results.append({n: t.clone() for n, t in average.averaged_parameters().items()})
    assert differences(*results) == []


def captured(work):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


@pytest.mark.parametrize("overlap", [False, True])
def test_replays_of_a_captured_step_beside_updates_that_are_not(overlap):
    model, plain = large(), large()
    average, reference = EMAModel(model, 0.9, overlap=overlap), EMAModel(plain, 0.9)
    gradient = [torch.full_like(parameter, 0.5) for parameter in model]

    def step(params, optimizer):
        for parameter, grad in zip(params, gradient, strict=True):
            parameter.grad = grad
        optimizer.step()

    ours, theirs = (torch.optim.SGD(params.parameters(), 0.1) for params in (model, plain))
    graph = captured(lambda: step(model, ours))
    for _ in range(2):  # the warm-up; what is captured is not run
        step(plain, theirs)
    for count in range(8):
        graph.replay()
        average.update()
        if count == 4:
            step(model, ours)
            average.update()
    for count in range(8):
        step(plain, theirs)
        reference.update()
        if count == 4:
            step(plain, theirs)
            reference.update()
    assert differences(average.averaged_parameters(), reference.averaged_parameters()) == []


@pytest.mark.parametrize(
    "options", [{}, {"on_nonfinite": "skip"}, {"compensated": True}, {"overlap": True}], ids=str
)
def test_an_update_is_captured(options):
    """And repeated; one that holds NaN is skipped within the graph."""
    model = make().cuda()
    plain = copy.deepcopy(model)
    average = EMAModel(model, 0.9, **options)
    reference = EMAModel(plain, 0.9, compensated="compensated" in options)
    graph = captured(average.update)
    reference.update()
    reference.update()
    for step in range(4):
        for parameter in (*model, *plain):
            with torch.no_grad():
                parameter.add_(0.5)
        bad = options.get("on_nonfinite") and step == 2
        if bad:
            kept = model[5].detach().clone()
            model[5].data[2] = float("nan")
        graph.replay()
        if bad:
            model[5].data.copy_(kept)
        else:
            reference.update()
    torch.cuda.synchronize()
    assert differences(average.averaged_parameters(), reference.averaged_parameters()) == []
    assert average.skipped == 0


@pytest.mark.parametrize(
    "options",
    [
        {"on_nonfinite": "raise"},
        {"dtype": torch.bfloat16},
        {"decay": ema.DebiasedDecay(decay=0.9)},
        {"device": "cpu"},
    ],
    ids=str,
)
def test_what_cannot_be_captured_is_refused(options):
    model = make().cuda()
    average = EMAModel(model, **{"decay": 0.9, **options})
    average.update()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(StateError, match="CUDA graph"), torch.cuda.graph(graph):
        average.update()
    torch.cuda.synchronize()
    assert (average.step, average.count) == (1, 1)
    average.update()
    assert average.count == 2


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({}, 0),
        ({"overlap": True}, 0),
        ({"compensated": True}, 0),
        ({"dtype": torch.bfloat16}, 0),
        ({"on_nonfinite": "skip"}, 0),
        ({"on_nonfinite": "raise"}, 1),
        ({"on_nonfinite": "skip", "device": "cpu"}, 1),
        ({"device": "cpu"}, 0),
    ],
    ids=str,
)
def test_how_often_the_host_waits(options, waits):
    model = make().cuda()
    average = EMAModel(model, 0.9, **options)
    average.update()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            average.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in found if "called a synchronizing" in str(w.message)]) == waits


@pytest.fixture(params=["Triton", "PyTorch"])
def way(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr(kernels, "available", lambda device: False)
    return request.param


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.usefixtures("way")
def test_every_bit_goes_in_and_comes_back(live, assign):
    model = nn.ParameterList([nn.Parameter(p.detach().to(live)) for p in make()]).cuda()
    model.append(model[1])
    model.append(nn.Parameter(torch.randn(1 << 15, dtype=live, device="cuda")[3:]))
    average = EMAModel(model, 0.9)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            parameter.add_(1.0)
    average.update()
    live_before = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = {name: a.clone() for name, a in average.averaged_parameters().items()}
    with average.use_ema(assign=assign):
        shown = {name: a.to(live) for name, a in before.items()}
        assert differences({n: p.detach() for n, p in model.named_parameters()}, shown) == []
    assert differences({n: p.detach() for n, p in model.named_parameters()}, live_before) == []
    assert differences(average.averaged_parameters(), before) == []


def test_a_swap_of_many_tensors_is_few_launches():
    model = nn.ParameterList([nn.Parameter(torch.randn(3, 5)) for _ in range(1000)]).cuda()
    average = EMAModel(model, 0.9)
    with average.use_ema():
        pass
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with average.use_ema():
            pass
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.name == "exchange"]
    assert len(launched) == 2
    assert swap_module.many_at_once(torch.device("cuda", 0))


def test_the_default_device_does_not_matter():
    model = make()
    torch.set_default_device("cuda")
    try:
        average = EMAModel(model, 0.9, on_nonfinite="skip")
        card = make().to("cuda")
        behind = EMAModel(card, 0.9, device="cpu")
        for one in (average, behind):
            one.update()
        assert {a.device.type for a in behind.averaged_parameters().values()} == {"cpu"}
    finally:
        torch.set_default_device(None)
