"""Optimizers that rewrite the weights in ``eval()`` and ``train()`` rewrite the live ones."""

import copy
import pickle
import types

import pytest
import schedulefree
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from ema import EMACallback, EMAModel
from ema.torch_backend.trainer.optimizer_modes import RunOptimizer, with_modes
from tests.torch_backend.trainer.small_runs import (
    Net,
    Recording,
    arguments,
    averaging_by_hand,
    equal,
    loss_of,
    rows,
    weights,
)

DECAY = 0.7


class Doubling(torch.optim.SGD):
    """Doubles the weights in ``eval()`` and halves them in ``train()``."""

    trains = True

    def eval(self):
        self._become(False, 2.0)

    def train(self):
        self._become(True, 0.5)

    @torch.no_grad()
    def _become(self, trains, factor):
        if self.trains != trains:
            self.trains = trains
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(factor)


def new_optimizer(name, parameters):
    if name == "doubling":
        return Doubling(parameters, lr=0.02)
    kinds = {
        "sgd": schedulefree.SGDScheduleFree,
        "adamw": schedulefree.AdamWScheduleFree,
        "radam": schedulefree.RAdamScheduleFree,
    }
    return kinds[name](parameters, lr=0.05)


class Unaware(Recording):
    """Evaluates without a word to the optimizer."""

    def evaluation_loop(self, dataloader, *args, **kwargs):
        optimizer, self.optimizer = self.optimizer, None
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.optimizer = optimizer


def train(folder, name, callback=None, attached=False, kind=Recording):
    """A run with a set of evaluations whose steps are not those of the last one."""
    model = Net()
    optimizer = new_optimizer(name, model.parameters())
    trainer = kind(
        model=model,
        args=arguments(folder, eval_strategy="steps", eval_steps=3, max_steps=8),
        train_dataset=rows(12),
        eval_dataset={"one": rows(seed=2), "two": rows(seed=3)},
        callbacks=[] if callback is None else [callback],
        optimizers=(optimizer, None),
    )
    if attached:
        callback.attach(trainer)
    with averaging_by_hand(trainer, DECAY):
        trainer.train()
    return trainer


def state(trainer):
    """All that an optimizer with modes and its weights are."""
    inner = with_modes(trainer.optimizer)
    modes = [group.get("train_mode") for group in inner.param_groups]
    return weights(trainer.model), modes, getattr(inner, "trains", None)


def assert_unchanged(trainer, before):
    now = state(trainer)
    assert equal(now[0], before[0])
    assert now[1:] == before[1:]
    assert not {"eval", "train", "__getstate__"} & vars(with_modes(trainer.optimizer)).keys()


OPTIMIZERS = ["adamw", "sgd", "radam", "doubling"]


@pytest.mark.parametrize("attached", [False, True], ids=["events", "attached"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_as_without_us_and_metrics_are_of_the_average(name, attached, tmp_path):
    """The optimizer changes its mode as often as without us, with its own weights in the model."""
    callback = EMACallback(DECAY, eval_with_ema=True)
    plain, trainer = train(tmp_path, name), train(tmp_path, name, callback, attached)
    assert all(map(equal, trainer.trained, plain.trained))
    assert_unchanged(trainer, state(plain))
    assert equal(callback.get_ema_state()["averages"], trainer.average)
    assert len(trainer.evaluated) == 6
    by_hand = [
        loss_of(average, data)
        for average, (_, data) in zip(trainer.averages, trainer.evaluated, strict=True)
    ]
    assert [loss for loss, _ in trainer.evaluated] == by_hand


@pytest.mark.parametrize("attached", [False, True], ids=["events", "attached"])
@pytest.mark.parametrize("name", ["adamw", "doubling"])
def test_an_evaluation_that_does_not_tell_the_optimizer(name, attached, tmp_path):
    """Neither do we: training is as without us."""
    callback = EMACallback(DECAY, eval_with_ema=True)
    plain = train(tmp_path, name, kind=Unaware)
    trainer = train(tmp_path, name, callback, attached, kind=Unaware)
    assert all(map(equal, trainer.trained, plain.trained))
    assert_unchanged(trainer, state(plain))


def by_attachment(trainer, callback):
    callback.attach(trainer)
    try:
        return trainer.evaluate(rows(seed=2))["eval_loss"]
    finally:
        callback.detach()


def by_block(trainer, callback):
    with callback.use_ema(trainer.model):
        return trainer.evaluate(rows(seed=2))["eval_loss"]


def by_halves(trainer, callback):
    callback.apply_ema(trainer.model)
    callback.apply_ema(trainer.model)
    try:
        return trainer.evaluate(rows(seed=2))["eval_loss"]
    finally:
        callback.restore_original(trainer.model)


def by_assignment(trainer, callback):
    with callback.use_ema(trainer.model, assign=True):
        return trainer.evaluate(rows(seed=2))["eval_loss"]


def in_each_other(trainer, callback):
    with callback.use_ema(trainer.model):
        return by_attachment(trainer, callback)


WAYS = [by_attachment, by_block, by_halves, by_assignment, in_each_other]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_evaluating_after_training_moves_neither_weights_nor_average(name, way, tmp_path):
    """Whatever the mode of the optimizer was: it stays, and the metric is of the average."""
    callback = EMACallback(DECAY, eval_with_ema=True)
    trainer = train(tmp_path, name, callback)
    for mode in ("train", "eval"):
        getattr(trainer.optimizer, mode)()
        before = state(trainer)
        assert way(trainer, callback) == loss_of(trainer.average, rows(seed=2))
        assert_unchanged(trainer, before)
        assert equal(callback.get_ema_state()["averages"], trainer.average)


@pytest.mark.parametrize("name", ["adamw", "doubling"])
def test_a_mode_that_is_changed_by_hand_within_a_swap_is_that_of_the_live_weights(name, tmp_path):
    """As if it had been changed before: in a block, and between the two halves."""
    callback = EMACallback(DECAY, eval_with_ema=True)
    trainer = train(tmp_path, name, callback)
    trainer.optimizer.train()
    model, training = trainer.model, weights(trainer.model)
    with callback.use_ema(model):
        trainer.optimizer.eval()
        assert equal(weights(model), trainer.average)
    assert not equal(weights(model), training)
    evaluating = weights(model)
    callback.apply_ema(model)
    trainer.optimizer.train()
    assert equal(weights(model), trainer.average)
    callback.restore_original(model)
    trainer.optimizer.eval()
    assert all(torch.allclose(weights(model)[key], evaluating[key]) for key in evaluating)
    assert equal(callback.get_ema_state()["averages"], trainer.average)


def test_weights_that_were_restored_past_the_callback(tmp_path):
    """The optimizer rewrites them as ever."""
    callback = EMACallback(DECAY)
    trainer = train(tmp_path, "doubling", callback)
    trainer.optimizer.train()
    before = weights(trainer.model)
    callback.apply_ema(trainer.model)
    callback.ema_model.restore_original()
    trainer.optimizer.eval()
    assert equal(weights(trainer.model), {name: 2 * value for name, value in before.items()})


def test_an_optimizer_is_known_by_its_two_methods():
    """Inside wrappers that always have them, and inside one more."""
    parameters = [nn.Parameter(torch.ones(2))]
    doubling = Doubling(parameters, lr=0.1)
    Accelerator(cpu=True)
    accelerated = AcceleratedOptimizer(doubling, device_placement=False)
    assert with_modes(doubling) is with_modes(accelerated) is doubling
    assert with_modes(types.SimpleNamespace(optimizer=doubling)) is doubling
    plain = torch.optim.SGD(parameters, lr=0.1)
    wrapper = schedulefree.ScheduleFreeWrapper(plain)
    assert with_modes(wrapper) is wrapper
    for optimizer in (None, plain, AcceleratedOptimizer(plain, device_placement=False)):
        assert with_modes(optimizer) is None


def test_the_optimizer_of_a_run_is_not_kept_alive():
    """Nor does it travel with a copy."""
    optimizer, kept = Doubling([nn.Parameter(torch.ones(2))], lr=0.1), RunOptimizer()
    kept.set(optimizer)
    assert kept.get() is optimizer
    assert copy.deepcopy(kept).get() is None
    assert pickle.loads(pickle.dumps(kept)).get() is None
    del optimizer
    assert kept.get() is None


def test_by_hand_the_optimizer_is_told_before_the_swap_and_after_it():
    """What docs/pytorch.md says of a loop without a Trainer."""
    model = Net()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
    ema_model = EMAModel(model, decay=DECAY)
    optimizer.train()
    for row in rows():
        model(row["x"][None], row["labels"][None])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        ema_model.update()
    average = {name: value.clone() for name, value in ema_model.averaged_parameters().items()}
    live = weights(model)
    optimizer.eval()
    with ema_model.use_ema():
        assert equal(weights(model), average)
    optimizer.train()
    assert equal(dict(ema_model.averaged_parameters()), average)
    assert all(torch.allclose(weights(model)[name], live[name]) for name in live)
