"""When the averages are in the model: from an evaluation's ``model.eval()`` to its last callback."""

import copy
import io
import pickle
import types
import warnings
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from transformers import Trainer, TrainerCallback

from ema import EMACallback
from ema.errors import EMAWarning
from ema.torch_backend import EMAModel
from ema.torch_backend.trainer.evaluation import live_weights
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
SEEN_LIVE = "this evaluation saw live weights"


class Watching(Recording):
    """Knows by hand what the averages are, and keeps the live weights of the last step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.live = {}

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self.live = weights(self.model)
        return super()._maybe_log_save_evaluate(*args, **kwargs)


class Look(TrainerCallback):
    """Calls a function in one event."""

    def __init__(self, event, function):
        setattr(self, event, function)


def new_trainer(folder, callbacks, kind=Watching, eval_dataset=None, model=None, **options):
    settings = {"eval_strategy": "steps", "eval_steps": 4, **options}
    return kind(
        model=Net() if model is None else model,
        args=arguments(folder, **settings),
        train_dataset=rows(12),
        eval_dataset=rows(seed=2) if eval_dataset is None else eval_dataset,
        callbacks=callbacks,
    )


def train(trainer, callback, attached):
    """Train, and know the averages by hand."""
    if attached:
        callback.attach(trainer)
    with averaging_by_hand(trainer, DECAY):
        trainer.train()
    return trainer


def whole(model, value):
    return {name: tensor.detach().clone() for name, tensor in value(model)}


def parts(model):
    """The state dicts of the parts."""
    for name, child in model.named_children():
        for key, tensor in child.state_dict().items():
            yield f"{name}.{key}", tensor


@pytest.fixture(params=[False, True], ids=["events", "attached"])
def attached(request):
    return request.param


@pytest.fixture
def callback():
    return EMACallback(DECAY, eval_with_ema=True)


@pytest.mark.parametrize("before", [True, False], ids=["in-front", "behind"])
def test_what_on_evaluate_shows_is_what_the_metric_is_of(before, attached, callback, tmp_path):
    """State dicts, parameters and attributes alike, for each set of a dict."""
    seen = []

    def on_evaluate(args, state, control, model=None, metrics=None, **kwargs):
        loss = next(value for key, value in metrics.items() if key.endswith("_loss"))
        seen.append(
            (
                loss,
                {name: tensor.clone() for name, tensor in model.state_dict().items()},
                whole(model, type(model).named_parameters),
                whole(model, parts),
                weights(model),
                copy.deepcopy(model).state_dict(),
            )
        )

    look = Look("on_evaluate", on_evaluate)
    sets = {"one": rows(seed=2), "two": rows(seed=3)}
    order = [look, callback] if before else [callback, look]
    trainer = train(new_trainer(tmp_path, order, eval_dataset=sets), callback, attached)
    assert len(seen) == 4
    for (loss, *shown), average, (_, data) in zip(
        seen, trainer.averages, trainer.evaluated, strict=True
    ):
        assert loss == loss_of(average, data)
        assert all(equal(tensors, average) for tensors in shown)
    assert equal(weights(trainer.model), trainer.live)


def test_a_callback_that_calls_eval_itself_sees_live_weights(callback, tmp_path):
    """At the end of the step that evaluates; the evaluation itself sees the averages."""
    seen = []

    def on_step_end(args, state, control, model=None, **kwargs):
        before = weights(model)
        model.eval()
        model(**{key: value[None] for key, value in rows(1)[0].items()})
        seen.append(equal(weights(model), before) and equal(model.state_dict(), before))

    look = Look("on_step_end", on_step_end)
    trainer = train(new_trainer(tmp_path, [callback, look]), callback, attached=False)
    assert seen == [True] * 8
    by_hand = [loss_of(average, rows(seed=2)) for average in trainer.averages]
    assert [loss for loss, _ in trainer.evaluated] == by_hand


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate"])
def test_a_copy_of_the_model_carries_nothing_of_ours(event, make, callback, tmp_path):
    """Made of the armed model or of one with averages in it: a plain model with these weights."""
    copies = []

    def look(args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            copies.append((make(model), weights(model)))

    class Careless(Watching):
        """Puts the copy into evaluation mode where the model would get the averages."""

        def evaluation_loop(self, *args, **kwargs):
            for other, _ in copies:
                other.eval()
                if not self.evaluated:
                    assert equal(weights(self.model), self.live)
            return super().evaluation_loop(*args, **kwargs)

    trainer = new_trainer(tmp_path, [callback, Look(event, look)], kind=Careless)
    train(trainer, callback, attached=False)
    ((other, expected),) = copies
    for ours, plain in zip(other.modules(), trainer.model.modules(), strict=True):
        assert vars(ours).keys() == vars(plain).keys()
    if make is not copy.copy:  # which shares its parameters with the model
        assert equal(weights(other), expected)
    assert other.train().training
    assert equal(weights(trainer.model), trainer.live)


def test_a_train_of_the_models_own_is_called_and_is_back(callback, tmp_path):
    """Also in copies of the armed model."""
    model, modes, kept = Net(), [], []

    def own(self, mode=True):
        modes.append(mode)
        return Net.train(self, mode)

    model.train = types.MethodType(own, model)
    method = vars(model)["train"]
    look = Look("on_step_end", lambda *a, model=None, **k: kept.append(copy.deepcopy(model)))
    train(new_trainer(tmp_path, [callback, look], model=model), callback, attached=False)
    assert vars(model)["train"] is method
    assert modes.count(False) == 2
    assert all(vars(other)["train"].__func__ is own for other in kept)
    assert all(vars(other)["train"].__self__ is other for other in kept)


class Predicting(Watching):
    """Predicts after each evaluation, as part of training."""

    def evaluate(self, *args, **kwargs):
        metrics = super().evaluate(*args, **kwargs)
        metrics["test_loss"] = self.predict(rows(seed=5)).metrics["test_loss"]
        self.after = weights(self.model)
        return metrics


def test_a_prediction_of_training_sees_the_averages(attached, callback, tmp_path):
    """And so do callbacks in on_predict; live weights come back after the last one."""
    seen = []
    look = Look("on_predict", lambda *a, model=None, **k: seen.append(weights(model)))
    trainer = train(new_trainer(tmp_path, [callback, look], kind=Predicting), callback, attached)
    assert len(trainer.evaluated) == 4
    by_hand = [
        loss_of(average, data)
        for average, (_, data) in zip(trainer.averages, trainer.evaluated, strict=True)
    ]
    assert [loss for loss, _ in trainer.evaluated] == by_hand
    assert all(map(equal, seen, trainer.averages[1::2]))
    if not attached:  # where this is still within the evaluation
        assert equal(trainer.after, trainer.live)
    assert equal(weights(trainer.model), trainer.live)


def test_an_evaluation_without_a_forward_pass_ends_with_live_weights(attached, callback, tmp_path):
    """An empty data set."""

    class Patient(Watching):
        def evaluation_loop(self, *args, **kwargs):
            return Trainer.evaluation_loop(self, *args, **kwargs)

    trainer = new_trainer(tmp_path, [callback], kind=Patient)
    trainer.eval_dataset = torch.utils.data.Subset(rows(), [])
    train(trainer, callback, attached)
    plain = new_trainer(tmp_path, [])
    plain.train()
    assert all(map(equal, trainer.trained, plain.trained))
    assert equal(weights(trainer.model), weights(plain.model))


class Blind(Watching):
    """Evaluates in whatever mode the model is."""

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self.seen = weights(self.model)
        self.own = "train" in vars(self.model)
        return types.SimpleNamespace(metrics={"eval_loss": 1.0}, num_samples=8)


def test_an_evaluation_that_never_calls_eval(attached, callback, tmp_path):
    """Alone, it sees live weights, a warning says so, and the model is as it was; attached, averages."""
    left = []
    look = Look("on_step_begin", lambda *a, model=None, **k: left.append("train" in vars(model)))
    trainer = new_trainer(tmp_path, [callback, look], kind=Blind)
    if attached:
        train(trainer, callback, attached)
        assert equal(trainer.seen, trainer.average)
    else:
        with torch.random.fork_rng():
            another = EMAModel(Net())  # holds its own averages all the time
        with another.use_ema(), pytest.warns(EMAWarning, match=SEEN_LIVE):
            train(trainer, callback, attached)
        assert equal(trainer.seen, trainer.live)
        assert trainer.own
    plain = new_trainer(tmp_path, [], kind=Blind)
    plain.train()
    assert all(map(equal, trainer.trained, plain.trained))
    assert left == [False] * 8
    assert "train" not in vars(trainer.model)


class Early(Watching):
    """Raises before the evaluation has begun."""

    def get_eval_dataloader(self, *args):
        raise ZeroDivisionError


class Late(Watching):
    """Raises after a forward pass of the evaluation."""

    def prediction_step(self, *args, **kwargs):
        super().prediction_step(*args, **kwargs)
        raise ZeroDivisionError


def fail(*args, **kwargs):
    raise ZeroDivisionError


READS = {
    "named_parameters": lambda model: dict(model.named_parameters()),
    "parameters": lambda model: dict(
        zip(model.state_dict(), list(model.parameters()), strict=True)
    ),
    "state_dict": lambda model: model.state_dict(),
    "eval": lambda model: weights(model.eval()),
    "train": lambda model: weights(model.train()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("where", ["before", "within", "on_evaluate"])
def test_an_evaluation_that_raises_ends_with_live_weights(
    where, read, attached, callback, tmp_path
):
    """Attached at once; alone as soon as anything asks the model, wherever it raised."""
    look = Look("on_evaluate" if where == "on_evaluate" else "on_predict", fail)
    kind = {"before": Early, "within": Late}.get(where, Watching)
    trainer = new_trainer(tmp_path, [callback, look], kind=kind)
    listed = list(trainer.callback_handler.callbacks)
    with pytest.raises(ZeroDivisionError):
        train(trainer, callback, attached)
    model = trainer.model
    if attached:
        assert equal(weights(model), trainer.live)
    assert equal({n: t.detach() for n, t in read(model).items()}, trainer.live)
    assert trainer.callback_handler.callbacks == listed
    model.eval()
    assert equal(weights(model), trainer.live)
    assert not {"train", "state_dict", "__getstate__"} & vars(model).keys()


def test_evaluate_after_an_evaluation_that_raised_is_as_documented(callback, tmp_path):
    """Alone and outside of training: of the live weights."""
    trainer = new_trainer(tmp_path, [callback, bad := Look("on_evaluate", fail)])
    with pytest.raises(ZeroDivisionError):
        train(trainer, callback, attached=False)
    trainer.remove_callback(bad)
    assert trainer.evaluate()["eval_loss"] == loss_of(trainer.live, rows(seed=2))


class Reading(Watching):
    """Reads the state dict in the middle of an evaluation, for a norm, say."""

    def prediction_step(self, *args, **kwargs):
        self.model.state_dict()
        list(self.model.parameters())
        self.model.eval()
        return super().prediction_step(*args, **kwargs)


def test_reading_the_weights_in_an_evaluation_does_not_end_it(attached, callback, tmp_path):
    """Each batch is of the average."""
    trainer = new_trainer(
        tmp_path, [callback], kind=Reading, per_device_eval_batch_size=4, eval_steps=8
    )
    train(trainer, callback, attached)
    ((loss, data),) = trainer.evaluated
    (average,) = trainer.averages
    halves = [loss_of(average, data[:4]), loss_of(average, data[4:])]
    assert loss == pytest.approx(sum(halves) / 2, rel=1e-6)


def test_an_evaluation_that_a_later_callback_asks_for(attached, callback, tmp_path):
    """It sees the averages too."""

    def ask(args, state, control, **kwargs):
        control.should_evaluate = state.global_step == 5

    trainer = new_trainer(tmp_path, [callback, Look("on_step_end", ask)], eval_strategy="no")
    train(trainer, callback, attached)
    ((loss, data),) = trainer.evaluated
    assert loss == loss_of(trainer.averages[0], data)


def evaluate_in(event, before, callback, folder):
    """A run with a callback that evaluates on another set by itself."""
    losses, shown, busy = [], [], []

    def look(args, state, control, model=None, **kwargs):
        if state.global_step == 4 and not busy:
            busy.append(True)
            losses.append(trainer.evaluate(rows(seed=6), metric_key_prefix="own")["own_loss"])
            shown.append(weights(model))
            busy.clear()

    def last(args, state, control, model=None, **kwargs):
        if state.global_step == 4 and not busy:
            shown.append(weights(model))

    look, last = Look(event, look), Look(event, last)
    trainer = new_trainer(
        folder, [look, callback, last] if before else [callback, look, last], eval_steps=4
    )
    return trainer, losses, shown


@pytest.mark.parametrize("before", [True, False], ids=["in-front", "behind"])
def test_an_evaluation_within_on_evaluate(before, attached, callback, tmp_path):
    """It sees the averages as the one around it, and does not end that."""
    trainer, losses, shown = evaluate_in("on_evaluate", before, callback, tmp_path)
    train(trainer, callback, attached)
    average = trainer.averages[0]
    assert losses == [loss_of(average, rows(seed=6))]
    assert len(shown) == 2
    assert all(equal(tensors, average) for tensors in shown)
    assert equal(weights(trainer.model), trainer.live)


@pytest.mark.parametrize("before", [True, False], ids=["in-front", "behind"])
def test_an_evaluation_that_a_callback_runs_at_the_end_of_a_step(
    before, attached, callback, tmp_path
):
    """Alone, it is of the live weights and a warning says so; all callbacks see these."""
    trainer, losses, shown = evaluate_in("on_step_end", before, callback, tmp_path)
    if attached:
        train(trainer, callback, attached)
    else:
        with pytest.warns(EMAWarning, match=SEEN_LIVE):
            train(trainer, callback, attached)
    live = trainer.trained[4]
    assert all(equal(tensors, live) for tensors in shown)
    of_average = loss_of(trainer.averages[1], rows(seed=2))
    assert trainer.evaluated[1][0] == of_average
    if not attached:
        assert losses == [loss_of(live, rows(seed=6))]
    elif not before:
        assert losses == [loss_of(trainer.averages[0], rows(seed=6))]


def test_a_checkpoint_that_is_written_in_on_evaluate_holds_live_weights(
    attached, callback, tmp_path
):
    """Attached, later callbacks still see the averages; alone they do not, and a warning says so."""
    shown = []

    def save(args, state, control, model=None, **kwargs):
        with live_weights(model) if attached else nullcontext():
            trainer._save_checkpoint(model, trial=None)

    def last(args, state, control, model=None, **kwargs):
        shown.append(weights(model))

    trainer = new_trainer(
        tmp_path, [callback, Look("on_evaluate", save), Look("on_evaluate", last)], eval_steps=8
    )
    expect = warnings.catch_warnings() if attached else pytest.warns(match="holds the live weights")
    with expect:
        train(trainer, callback, attached)
    stored = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    assert equal(stored, trainer.live)
    assert equal(shown[0], trainer.average if attached else trainer.live)


def test_weights_that_a_callback_loads_in_on_evaluate_are_live(callback, tmp_path):
    """The average stays what it is."""
    other = Net(seed=9).state_dict()

    def load(args, state, control, model=None, **kwargs):
        if state.global_step == 8:
            model.load_state_dict(other)

    trainer = new_trainer(tmp_path, [callback, Look("on_evaluate", load)])
    train(trainer, callback, attached=False)
    assert equal(weights(trainer.model), other)
    assert equal(callback.get_ema_state()["averages"], trainer.average)


class Casting(Net):
    """Looks at its own parameters in the forward pass."""

    def forward(self, x=None, labels=None, num_items_in_batch=None):
        return super().forward(x.to(next(self.parameters()).dtype), labels)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo
@pytest.mark.parametrize("how", ["wrapped", "in-place"])
def test_a_compiled_model_is_not_compiled_again(how, attached, tmp_path):
    """As many graphs as without us, and no break in them."""
    graphs, losses = [], []
    for ours in (False, True):
        torch._dynamo.reset()
        counter, model = CompileCounter(), Casting()
        if how == "wrapped":
            model = torch.compile(model, backend=counter, fullgraph=True)
        else:
            model.compile(backend=counter, fullgraph=True)
        callback = EMACallback(DECAY, eval_with_ema=True)
        trainer = new_trainer(
            tmp_path,
            [callback] if ours else [],
            model=model,
            eval_steps=1,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        if ours and attached:
            callback.attach(trainer)
        trainer.train()
        graphs.append(counter.frame_count)
        losses.append([log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log])
    torch._dynamo.reset()
    assert graphs[0] == graphs[1]
    assert len(losses[1]) == 8
    assert losses[0] != losses[1]
