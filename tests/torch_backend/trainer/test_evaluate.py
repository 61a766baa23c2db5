"""Evaluations see the averaged weights; training and checkpoints see the live ones."""

import gc
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from ema import EMACallback, StateError
from tests.torch_helpers import assert_same

DECAY = 0.6

EVALUATIONS = {
    "steps": {"eval_strategy": "steps", "eval_steps": 2},
    "epochs": {"eval_strategy": "epoch"},
    "two-sets": {"eval_strategy": "steps", "eval_steps": 2},
}
BEST = {"load_best_model_at_end": True, "greater_is_better": True}


def saving(evaluation, same, best):
    """Options that save at the steps that evaluate, or at others, as far as the Trainer lets them."""
    if evaluation == "epochs":
        if same:
            return {"save_strategy": "epoch"}
        return {"save_strategy": "best"} if best else {"save_strategy": "steps", "save_steps": 3}
    return {"save_strategy": "steps", "save_steps": 2 if same else 4 if best else 3}


def load(model, tensors):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model.eval()


@pytest.fixture
def by_hand(new_gpt2):
    """The loss of these weights on a set of eight rows, which the Trainer makes one batch of."""

    def loss(tensors, rows):
        model = load(new_gpt2(), tensors)
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        with torch.no_grad():
            return model(**batch).loss.item()

    return loss


@pytest.fixture(scope="module")
def histories():
    """The weights of runs without any average, by the way they evaluate."""
    return {}


@pytest.fixture
def assert_equal():
    """The parameters of a model are these."""
    return lambda model, tensors: assert_same(
        {n: p.detach() for n, p in model.named_parameters()}, tensors
    )


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
@pytest.mark.parametrize("same", [True, False], ids=["save-there", "save-elsewhere"])
@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_metrics_are_of_the_average_and_checkpoints_of_the_live_weights(
    evaluation,
    same,
    best,
    attached,
    new_gpt2,
    train,
    recorder,
    tokens,
    by_hand,
    assert_equal,
    histories,
):
    """Each metric equals an evaluation by hand, each checkpoint the weights of its step."""
    sets = {"": tokens(8, seed=1)}
    if evaluation == "two-sets":
        sets = {"_one": tokens(8, seed=1), "_two": tokens(8, seed=2)}
    options = EVALUATIONS[evaluation] | {"rows": 8, "steps": 12}
    options["eval_dataset"] = sets.get("") or {name[1:]: rows for name, rows in sets.items()}
    options["metric_for_best_model"] = f"eval{next(iter(sets))}_loss"
    if evaluation not in histories:
        plain = new_gpt2()
        train(plain, [reference := recorder(plain)], **options)
        histories[evaluation] = reference.history

    model = new_gpt2()
    record, callback = recorder(model), EMACallback(DECAY, eval_with_ema=True)
    trainer = train(
        model,
        [record, callback],
        attach=callback if attached else None,
        **options,
        **saving(evaluation, same, best),
        **(BEST if best else {}),
    )
    assert len(record.history) == 13
    for ours, theirs in zip(record.history, histories[evaluation], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    evaluated = {}
    for name, rows in sets.items():
        losses = {
            log["step"]: log[f"eval{name}_loss"]
            for log in trainer.state.log_history
            if f"eval{name}_loss" in log
        }
        assert list(losses) == ([4, 8, 12] if evaluation == "epochs" else [2, 4, 6, 8, 10, 12])
        assert losses == {t: by_hand(record.average(DECAY, t), rows) for t in losses}
        evaluated = evaluated or losses

    checkpoints = list(Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        stored = safetensors.torch.load_file(checkpoint / "model.safetensors")
        live = record.history[step]
        assert all(torch.equal(stored[name], live[name]) for name in live)

    step = 12
    if best:
        steps = [t for t in evaluated if evaluated[t] == max(evaluated.values())]
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{steps[0]}") or not same
        if trainer.state.best_model_checkpoint is not None:
            step = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert callback.ema_model.step == step
    assert_equal(model, record.history[step])
    average = record.average(DECAY, step)
    ours = callback.ema_model.averaged_parameters()
    assert all(torch.equal(ours[name], average[name]) for name in average)


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_the_first_evaluation_of_all(gpt2, train, tokens, by_hand, recorder, attached):
    """eval_on_start sees the average, which may be one that was loaded."""
    first = EMACallback(DECAY)
    train(gpt2, [first])
    callback = EMACallback(DECAY, eval_with_ema=True)
    callback.load_ema_state(first.get_ema_state())
    live = {n: p.detach().clone() for n, p in gpt2.named_parameters()}
    rows = tokens(8, seed=1)
    trainer = train(
        gpt2,
        [record := recorder(gpt2), callback],
        attach=callback if attached else None,
        eval_dataset=rows,
        eval_strategy="epoch",
        eval_on_start=True,
    )
    first_loss = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    averages = first.get_ema_state()["averages"]
    assert first_loss == by_hand({**live, **averages}, rows)
    assert first_loss != by_hand(live, rows)
    assert len(record.history) == 7


STOPPING = {
    "steps": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4},
    "best": {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"},
    "epochs": {"eval_strategy": "epoch", "save_strategy": "best", "rows": 4},  # two steps in each
}


@pytest.mark.parametrize("saving", STOPPING.values(), ids=STOPPING)
@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_early_stop_on_a_step_that_only_evaluates(
    gpt2, train, tokens, recorder, assert_equal, attached, saving
):
    """The best model is loaded into the live weights; by epochs no event comes before that."""
    scores = iter([1.0, 3.0, 2.0, 1.0])
    record, callback = recorder(), EMACallback(DECAY, eval_with_ema=True)
    trainer = train(
        gpt2,
        [record, callback, EarlyStoppingCallback(early_stopping_patience=2)],
        kind=partial(Trainer, compute_metrics=lambda _: {"score": next(scores)}),
        attach=callback if attached else None,
        steps=20,
        eval_dataset=tokens(8, seed=1),
        metric_for_best_model="score",
        **saving,
        **BEST,
    )
    assert trainer.state.global_step == 8
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert_equal(gpt2, record.history[4])
    average = record.average(DECAY, 4)
    ours = callback.ema_model.averaged_parameters()
    assert all(torch.equal(ours[name], average[name]) for name in average)


class Failing(Trainer):
    """Raises in the middle of its second evaluation."""

    def prediction_step(self, *args, **kwargs):
        if self.state.global_step >= 4:
            raise ZeroDivisionError
        return super().prediction_step(*args, **kwargs)


@pytest.fixture
def failed(gpt2, make_trainer, tokens, recorder):
    """A run that ended in an evaluation."""

    def run(attached):
        record, callback = recorder(gpt2), EMACallback(DECAY, eval_with_ema=True)
        trainer = make_trainer(
            gpt2,
            [record, callback],
            kind=Failing,
            eval_dataset=tokens(8, seed=1),
            eval_strategy="steps",
            eval_steps=2,
        )
        if attached:
            callback.attach(trainer)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        return gpt2, callback, record, trainer

    return run


def test_an_evaluation_that_raises_leaves_nothing_behind_when_attached(failed, assert_equal):
    model, _, record, _ = failed(attached=True)
    assert_equal(model, record.history[4])


AFTERWARDS = {
    "state_dict": lambda model, callback: model.state_dict(),
    "parameters": lambda model, callback: list(model.parameters()),
    "named_parameters": lambda model, callback: dict(model.named_parameters()),
    "model.eval": lambda model, callback: model.eval(),
    "state_dict of a part": lambda model, callback: model.transformer.h[0].state_dict(),
    "load_state_dict": lambda model, callback: model.load_state_dict({}, strict=False),
    "a training step": lambda model, callback: model.train()(torch.zeros(1, 2, dtype=torch.long)),
    "apply and restore": lambda model, callback: (
        callback.apply_ema(),
        callback.restore_original(),
    ),
}


@pytest.mark.parametrize("what", AFTERWARDS)
def test_an_evaluation_that_raises_ends_at_the_next_touch_when_alone(failed, assert_equal, what):
    """No event comes after it: the averages stay until the weights are read, loaded or trained."""
    model, callback, record, _ = failed(attached=False)
    name = "transformer.wte.weight"
    assert torch.equal(model.transformer.wte.weight, record.average(DECAY, 4)[name])
    AFTERWARDS[what](model, callback)
    assert_equal(model, record.history[4])
    modules = list(model.modules())
    assert not any({"train", "state_dict", "load_state_dict"} & vars(m).keys() for m in modules)


def test_training_again_after_an_evaluation_that_raised(failed, train, assert_equal, new_gpt2):
    """The next train() begins with the live weights and an average that equals them."""
    model, callback, record, _ = failed(attached=False)
    other = load(new_gpt2(), record.history[4])
    train(other, [])
    train(model, [callback])
    assert_equal(model, {n: p.detach() for n, p in other.named_parameters()})
    assert callback.ema_model.step == 6


def test_averages_that_are_asked_for_after_a_failure_are_the_averages(failed, tmp_path):
    """apply_ema hands over: reading the weights then does not end it; exports are right too."""
    model, callback, record, _ = failed(attached=False)
    name = "transformer.wte.weight"
    average = record.average(DECAY, 4)[name]
    callback.save_pretrained(model, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored[name], average)
    assert torch.equal(callback.get_ema_state()["averages"][name], average)
    callback.ema_model.export(tmp_path / "plain.safetensors")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "plain.safetensors")[name], average)
    callback.apply_ema(model)
    assert torch.equal(model.state_dict()[name], average)
    callback.restore_original(model)
    assert torch.equal(model.state_dict()[name], record.history[4][name])


class Nosy(TrainerCallback):
    """Uses the average at the end of an evaluation, as a user's callback may."""

    def __init__(self, callback, folder):
        self.callback, self.folder = callback, folder
        self.seen = []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.callback.save_pretrained(model, self.folder)
        with self.callback.use_ema(model):
            self.seen.append(model.state_dict()["transformer.wte.weight"].clone())


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_the_average_can_be_used_in_the_middle_of_an_evaluation(
    gpt2, train, tokens, recorder, by_hand, tmp_path, attached
):
    """Between two sets of a dict: the second one still sees the averaged weights."""
    record, callback = recorder(gpt2), EMACallback(DECAY, eval_with_ema=True)
    nosy = Nosy(callback, tmp_path / "export")
    rows = tokens(8, seed=2)
    trainer = train(
        gpt2,
        [record, callback, nosy],
        attach=callback if attached else None,
        eval_dataset={"one": tokens(8, seed=1), "two": rows},
        eval_strategy="steps",
        eval_steps=6,
    )
    average = record.average(DECAY)
    assert len(nosy.seen) == 2
    assert all(torch.equal(seen, average["transformer.wte.weight"]) for seen in nosy.seen)
    stored = safetensors.torch.load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(stored[name], average[name]) for name in average)
    losses = [x["eval_two_loss"] for x in trainer.state.log_history if "eval_two_loss" in x]
    assert losses == [by_hand(average, rows)]


def test_evaluate_and_predict_outside_of_training(
    gpt2, make_trainer, tokens, by_hand, assert_equal
):
    """Attached, they see the average once there is one; detached, the live weights again."""
    rows = tokens(8, seed=1)
    callback = EMACallback(DECAY, eval_with_ema=True)
    trainer = make_trainer(gpt2, [], eval_dataset=rows)
    assert callback.attach(trainer) is callback
    live = {n: p.detach().clone() for n, p in gpt2.named_parameters()}
    assert trainer.evaluate()["eval_loss"] == by_hand(live, rows)
    trainer.train()
    live = {n: p.detach().clone() for n, p in gpt2.named_parameters()}
    average = callback.get_ema_state()["averages"]
    expected = by_hand({**live, **average}, rows)
    assert trainer.evaluate()["eval_loss"] == expected
    assert trainer.evaluate(tokens(8, seed=1), metric_key_prefix="x")["x_loss"] == expected
    assert trainer.predict(rows).metrics["test_loss"] == expected
    assert_equal(gpt2, live)
    callback.detach()
    assert trainer.evaluate()["eval_loss"] == by_hand(live, rows)
    assert callback not in trainer.callback_handler.callbacks
    assert not {"train", "log", "evaluate", "predict"} & vars(trainer).keys()


def test_attach_and_detach_go_in_pairs(gpt2, make_trainer):
    """Twice, without, or out of turn is an error that changes nothing."""
    trainer = make_trainer(gpt2)
    slow, fast = EMACallback(0.6, name="slow"), EMACallback(0.5, name="fast")
    with pytest.raises(StateError, match="not attached to a Trainer"):
        slow.detach()
    slow.attach(trainer)
    with pytest.raises(StateError, match="attached to a Trainer already"):
        slow.attach(trainer)
    fast.attach(trainer)
    with pytest.raises(StateError, match="must come after that of other callbacks"):
        slow.detach()
    fast.detach()
    slow.detach()
    assert "train" not in vars(trainer)


class Own(Trainer):
    """A subclass with methods of its own, and other signatures."""

    def train(self):
        self.begun = True
        return super().train()

    def evaluate(self, *, loud=False, **options):
        self.loud = loud
        return super().evaluate(**options)


def test_a_subclass_keeps_its_own_methods(gpt2, make_trainer, tokens, by_hand):
    rows = tokens(8, seed=1)
    callback = EMACallback(DECAY, eval_with_ema=True)
    trainer = make_trainer(gpt2, [callback], kind=Own, eval_dataset=rows)
    callback.attach(trainer)
    trainer.train()
    loss = trainer.evaluate(loud=True)["eval_loss"]
    average = callback.get_ema_state()["averages"]
    assert loss == by_hand({n: average[n] for n, _ in gpt2.named_parameters()}, rows)
    assert trainer.begun
    assert trainer.loud


def test_attached_to_one_trainer_and_used_by_another(gpt2, make_trainer, tokens, by_hand):
    """There it does what events allow."""
    rows = tokens(8, seed=1)
    callback = EMACallback(DECAY, eval_with_ema=True)
    callback.attach(make_trainer(gpt2))
    options = {"eval_strategy": "steps", "eval_steps": 6, "eval_dataset": rows}
    trainer = make_trainer(gpt2, [callback], **options)
    trainer.train()
    average = callback.get_ema_state()["averages"]
    loss = next(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert loss == by_hand({n: average[n] for n, _ in gpt2.named_parameters()}, rows)


class Peak:
    """By how much the resident memory grew at most while the block ran; Linux keeps the mark."""

    def __enter__(self):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the mark begins here
        self._before = self._mark()
        return self

    def __exit__(self, *_):
        self.added = self._mark() - self._before

    def _mark(self):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


class OnlyEvaluating(Trainer):
    """Training that consists of one evaluation."""

    def train(self):
        return self.evaluate()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's accounting")
@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_no_copy_of_the_weights_while_evaluating(new_gpt2, make_trainer, tokens, attached):
    """80 MB of weights change places with their averages through a buffer of 4 MiB."""
    model = new_gpt2(n_layer=2, n_embd=912, n_head=2)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size > 75e6
    callback = EMACallback(DECAY, eval_with_ema=True)
    trainer = make_trainer(model, [callback], kind=OnlyEvaluating, eval_dataset=tokens(2, seed=1))
    trainer.evaluate()  # what it takes without any average
    callback._run.begin(model, again=False, may_begin_again=False)
    for _ in range(2):  # the first one warms up
        with Peak() as peak:
            if attached:
                callback.attach(trainer)
                trainer.evaluate()
                callback.detach()
            else:
                callback._begin_evaluation()
                trainer.train()
                callback._evaluation.end()
    assert peak.added < 0.3 * size
