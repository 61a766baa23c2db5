"""``recalibrate_batch_norm``: exact statistics, and nothing else changed."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import ema
from ema.torch_backend import EMAModel
from ema.torch_backend.batch_norm import _Pool, recalibrate_batch_norm


class Network(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3, momentum=momentum)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(3, 2)
        self.last = nn.BatchNorm1d(2)
        self.plain = nn.BatchNorm1d(2, track_running_stats=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x, scale=1.0):
        self.calls += 1
        x = self.dropout(self.norm(self.conv(x * scale)).mean((2, 3)))
        return self.plain(self.last(self.out(x)))


def data(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 2, 6, 6, generator=generator) * (k + 1) + k for k, n in enumerate(sizes)]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Network()


def test_the_first_layer_has_the_statistics_of_all_data_together(model):
    """Also where batches differ in size and in mean; in float64, unbiased, as torch has it."""
    batches = data(8, 8, 3)
    recalibrate_batch_norm(model, batches)
    seen = model.conv(torch.cat(batches)).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.norm.running_mean, seen.mean(1).float())
    torch.testing.assert_close(model.norm.running_var, seen.var(1).float())
    assert model.norm.num_batches_tracked == 3


def test_one_batch_gives_what_a_training_step_with_momentum_one_gives(model):
    twin = copy.deepcopy(model)
    twin.norm.momentum = twin.last.momentum = 1.0
    twin.dropout.p = 0.0
    (batch,) = data(8)
    recalibrate_batch_norm(model, [batch])
    twin.train()(batch)
    for ours, theirs in ((model.norm, twin.norm), (model.last, twin.last)):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_only_batch_norm_layers_change(momentum):
    model = Network(momentum)
    model.train()
    model.last.eval()
    before, modes = state(model), [m.training for m in model.modules()]
    recalibrate_batch_norm(model, data(4, 4))
    changed = {name for name, t in state(model).items() if not torch.equal(t, before[name])}
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{layer}.{name}" for layer in ("norm", "last") for name in names}
    assert [m.training for m in model.modules()] == modes
    assert model.norm.momentum == momentum
    assert not model.norm._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_batches_of_every_kind(model):
    expected, others = copy.deepcopy(model), [copy.deepcopy(model) for _ in range(4)]
    batches = data(4, 4)
    recalibrate_batch_norm(expected, batches)
    recalibrate_batch_norm(others[0], [(x, torch.zeros(4)) for x in batches])
    recalibrate_batch_norm(others[1], [{"x": x / 2, "scale": 2.0} for x in batches], device="cpu")
    recalibrate_batch_norm(others[2], ([x] for x in batches))
    recalibrate_batch_norm(others[3], ["01"], forward=lambda m, _: [m(x) for x in batches])
    for other in others:
        torch.testing.assert_close(other.norm.running_var, expected.norm.running_var)
        torch.testing.assert_close(other.last.running_mean, expected.last.running_mean)


def test_under_the_averaged_weights(model):
    ema_model = EMAModel(model, decay=0.5)
    with torch.no_grad():
        model.conv.weight.mul_(3.0)
    ema_model.update()
    batches = data(8)
    with ema_model.use_ema():
        recalibrate_batch_norm(model, batches)
        seen = model.conv(batches[0]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.norm.running_mean, seen.mean(1))


def test_after_an_error_everything_is_what_it_was(model):
    before = state(model)
    with pytest.raises(RuntimeError):
        recalibrate_batch_norm(model, [*data(4), torch.ones(1)])
    assert all(torch.equal(t, before[name]) for name, t in state(model).items())
    assert model.training
    assert not model.norm._forward_pre_hooks


def test_a_layer_that_is_not_called_keeps_its_statistics(model):
    model.unused = nn.BatchNorm1d(4)
    model.unused.running_mean.fill_(7.0)
    recalibrate_batch_norm(model, data(4))
    assert model.unused.running_mean.eq(7.0).all()


def test_mistakes(model):
    with pytest.raises(ema.ArgumentError, match="at least one batch"):
        recalibrate_batch_norm(model, [])
    with pytest.raises(ema.ArgumentTypeError, match="unless `forward` is given, got str"):
        recalibrate_batch_norm(model, ["x"])
    with pytest.raises(ema.ModelError, match="must have a BatchNorm layer"):
        recalibrate_batch_norm(nn.Linear(2, 2), [torch.ones(1, 2)])


def test_half_precision_values_are_added_up_in_double():
    """In float16 their squares would overflow."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    x = (torch.randn(64, 2) * 300).half()
    recalibrate_batch_norm(model, [x], forward=lambda m, b: m[0](b.float()))
    torch.testing.assert_close(model[0].running_var, x.double().var(0).float())


def _rank(rank, folder):
    """What a SyncBatchNorm layer does on one of two ranks; its forward would need a GPU."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    values = torch.arange(10.0)[:, None] ** 2
    pool = _Pool()
    for part in ((values[:3], values[3:4]), (values[4:],))[rank]:
        pool(None, (part,))
    result = pool.result("norm", nn.SyncBatchNorm(1))
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_synchronized_layers_put_the_ranks_together(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in (0, 1)
    ]
    try:
        assert [rank.wait() for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    values = torch.arange(10.0, dtype=torch.float64)[:, None] ** 2
    for rank in (0, 1):
        mean, var = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(mean, values.mean(0))
        torch.testing.assert_close(var, values.var(0))


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
