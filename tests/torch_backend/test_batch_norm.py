"""``recalibrate_batch_norm``: exact statistics, and nothing else changed."""

from __future__ import annotations

import copy
import sys
from functools import partial

import pytest
import torch
from torch import nn

import ema
from ema.torch_backend import EMAModel
from ema.torch_backend.batch_norm import _Pool, recalibrate_batch_norm
from tests import processes


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
    model.dropout.eval()
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


class Frozen(nn.Module):
    """A backbone that ``train`` keeps in evaluation mode, two layers deep, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
        self.head = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.register_buffer("switches", torch.zeros(()))

    def train(self, mode=True):
        super().train(mode)
        self.switches += 1
        self.backbone.eval()
        return self

    def forward(self, x):
        return self.head(self.backbone(x))


class Outer(nn.Module):
    """The override is that of a submodule."""

    def __init__(self):
        super().__init__()
        self.inner = Frozen()

    def forward(self, x):
        return self.inner(x)


def frozen_by_an_instance():
    """``train`` is replaced on the object, as scripts do that did not write the class."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))

    def train(mode=True):
        nn.Sequential.train(model, mode)
        model[0].eval()
        return model

    model.train = train
    return model


def changed_layers(model, call):
    """Names of the layers whose statistics ``call`` changes; it may change no mode nor buffer else."""
    before, modes = state(model), [m.training for m in model.modules()]
    call()
    assert [m.training for m in model.modules()] == modes
    after = state(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    layers = {name.rpartition(".")[0] for name in changed}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{layer}.{name}" for layer in layers for name in statistics}
    return layers


def rows():
    return list(torch.randn(4, 64, 3) * 10 + 3)


@pytest.mark.parametrize("mode", ["as constructed", "train", "eval"])
@pytest.mark.parametrize(
    ("make", "trained"),
    [(Frozen, "head.1"), (Outer, "inner.head.1"), (frozen_by_an_instance, "2")],
)
def test_layers_that_train_leaves_in_evaluation_mode_keep_their_statistics(make, trained, mode):
    """Whichever module overrides ``train``, and whatever mode the model is in."""
    model = make()
    if mode != "as constructed":
        model.train(mode == "train")
    assert changed_layers(model, lambda: recalibrate_batch_norm(model, rows())) == {trained}


def test_a_kept_layer_normalizes_by_its_own_statistics_on_the_way():
    """What comes after it sees what it sees in use."""
    model, batches = Frozen(), rows()
    model.backbone[0].running_mean.fill_(5.0)
    recalibrate_batch_norm(model, batches)
    model.eval()
    seen = model.head[0](model.backbone(torch.cat(batches)))
    torch.testing.assert_close(model.head[1].running_mean, seen.mean(0))
    torch.testing.assert_close(model.head[1].running_var, seen.var(0))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_the_loop_puts_into_evaluation_mode_keeps_its_statistics(compiled):
    """Where the model is in training mode, also inside wrappers; in evaluation mode it cannot be told."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2))
    model.train()
    model[0].eval()
    given = torch.compile(model, backend="eager") if compiled else model
    assert changed_layers(model, lambda: recalibrate_batch_norm(given, rows())) == {"2"}
    model.eval()
    call = partial(recalibrate_batch_norm, given, rows() + rows())
    assert changed_layers(model, call) == {"0", "2"}


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_with_frozen_parameters_alone_is_recomputed(training):
    """In training it gathers statistics, whatever its weights do."""
    model = nn.Sequential(nn.BatchNorm1d(3).requires_grad_(False), nn.BatchNorm1d(3, momentum=None))
    model.train(training)
    assert changed_layers(model, lambda: recalibrate_batch_norm(model, rows())) == {"0", "1"}


def test_a_model_that_keeps_all_layers_in_evaluation_mode_is_refused():
    model = Frozen()
    model.head = nn.Linear(3, 2)
    message = r"does not keep in evaluation mode, got `backbone.0`, `backbone.1.0`"
    with pytest.raises(ema.ModelError, match=message):
        recalibrate_batch_norm(model, rows())
    assert model.switches == 0


@pytest.mark.parametrize("training", [True, False])
def test_what_train_raises_is_raised_and_changes_nothing(training):
    class Stubborn(Frozen):
        def train(self, mode=True):
            super().train(mode)
            raise NotImplementedError("not this one")

    model = Stubborn()
    nn.Module.train(model, training)

    def call():
        with pytest.raises(NotImplementedError, match="not this one"):
            recalibrate_batch_norm(model, rows())

    assert changed_layers(model, call) == set()


def test_a_model_whose_train_moves_weights_is_put_into_its_mode_again():
    """Adapters that merge themselves in evaluation mode: ``eval`` undoes what asking did."""

    class Merging(nn.Sequential):
        merged = False

        def train(self, mode=True):
            if self.merged == mode:
                with torch.no_grad():
                    self[0].weight.add_(-8.0 if mode else 8.0)
                self.merged = not mode
            return super().train(mode)

    model = Merging(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        model[0].weight.zero_()
    for mode, value in ((True, 0.0), (False, 8.0)):
        model.train(mode)
        recalibrate_batch_norm(model, rows())
        assert model[0].weight.eq(value).all()
        assert model.training is mode


def test_under_averaged_weights_a_frozen_backbone_is_left_alone():
    model = Frozen()
    ema_model = EMAModel(model, decay=0.5)
    with ema_model.use_ema():
        model.eval()
        assert changed_layers(model, lambda: recalibrate_batch_norm(model, rows())) == {"head.1"}


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
    commands = [[sys.executable, __file__, rank, tmp_path] for rank in (0, 1)]
    processes.run_together(commands, [tmp_path / f"{rank}.log" for rank in (0, 1)])
    values = torch.arange(10.0, dtype=torch.float64)[:, None] ** 2
    for rank in (0, 1):
        mean, var = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(mean, values.mean(0))
        torch.testing.assert_close(var, values.var(0))


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2])
