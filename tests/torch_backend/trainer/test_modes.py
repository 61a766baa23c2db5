"""Ways of training: compiled, in half precision, begun again, searched over, repeated."""

import optuna
import pytest
import torch
from transformers import Trainer, TrainerCallback

from ema import EMACallback

DECAY = 0.6


def assert_is_average(callback, record):
    ours, expected = callback.get_ema_state()["averages"], record.average(DECAY)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo
@pytest.mark.parametrize(
    ("options", "attached"),
    [
        ({"activation_checkpointing": True}, True),
        ({"bf16": True}, False),
        ({"bf16": True}, True),
        ({"bf16_full_eval": True}, False),
        ({"bf16_full_eval": True}, True),
        ({"neftune_noise_alpha": 0.1}, False),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, False),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, True),
        pytest.param({"torch_compile": True}, False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_average_evaluation_and_checkpoint(
    new_gpt2, train, tokens, recorder, folder, options, attached
):
    """The average is exact, what is saved is live, and metrics are those of a model with it."""
    rows = tokens(8, seed=1)
    model = new_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    record, callback = recorder(), EMACallback(DECAY, eval_with_ema=True)
    trainer = train(
        model,
        [record, callback],
        attach=callback if attached else None,
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        **options,
    )
    assert callback.ema_model.count == 6
    assert_is_average(callback, record)
    averages = record.average(DECAY)
    live = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert all(torch.equal(live[name], record.history[-1][name]) for name in live)
    stored = new_gpt2().from_pretrained(folder / "checkpoint-6").state_dict()
    assert all(torch.equal(stored[name], live[name]) for name in live)
    losses = [x["eval_loss"] for x in trainer.state.log_history if "eval_loss" in x]
    if attached:
        callback.detach()
    trainer.is_in_train = True  # bf16_full_eval casts the model for good outside of training
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(averages[name])
    assert trainer.evaluate()["eval_loss"] == losses[-1]


class OutOfMemory(Trainer):
    """Two rows are too many from the third step on."""

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 1 and self.state.global_step == 2:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_training_that_begins_again_with_a_smaller_batch(gpt2, train, recorder, attached):
    """auto_find_batch_size: so does the average, from the weights at that moment."""
    record, callback = recorder(), EMACallback(DECAY)
    trainer = train(
        gpt2,
        [record, callback],
        attach=callback if attached else None,
        kind=OutOfMemory,
        auto_find_batch_size=True,
    )
    assert trainer.state.train_batch_size == 1
    assert callback.ema_model.count == trainer.state.global_step == 6
    assert_is_average(callback, record)


def test_training_that_begins_again_with_a_state(gpt2, train, recorder):
    """A state that was loaded is begun with again; the train() after that is a new run."""
    first = EMACallback(DECAY)
    train(gpt2, [first], steps=5)
    callback, record = EMACallback(DECAY), recorder()
    callback.load_ema_state(first.get_ema_state())
    train(gpt2, [record, callback], kind=OutOfMemory, auto_find_batch_size=True)
    expected = first.get_ema_state()["averages"]
    for live in record.history[1:]:
        for name, average in expected.items():
            average.lerp_(live[name], 1 - DECAY)
    ours = callback.get_ema_state()
    assert ours["count"] == 5 + 6
    assert all(torch.equal(ours["averages"][name], expected[name]) for name in expected)
    train(gpt2, [callback], auto_find_batch_size=True)
    assert callback.ema_model.count == 6


class Ends(TrainerCallback):
    """What the average is at the end of each trial."""

    def __init__(self, callback):
        self.callback, self.states = callback, []

    def on_train_end(self, args, state, control, **kwargs):
        self.states.append(self.callback.get_ema_state())


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    "hp_name", [None, lambda trial: f"trial{trial.number}"], ids=["run", "own"]
)
@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_each_trial_of_a_search_starts_fresh(
    new_gpt2, make_trainer, tokens, recorder, folder, attached, hp_name
):
    """Its own average, in the folder of its own checkpoints."""
    record = recorder()
    callback = EMACallback(DECAY, eval_with_ema=True, save_ema_model=True)
    ends = Ends(callback)
    trainer = make_trainer(
        None,
        [record, callback, ends],
        kind=lambda model, **options: Trainer(model_init=lambda: new_gpt2(seed=0), **options),
        eval_dataset=tokens(8, seed=1),
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
    )
    if attached:
        callback.attach(trainer)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        backend="optuna",
        n_trials=2,
        hp_name=hp_name,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    assert [state["count"] for state in ends.states] == [6, 6]
    name = "transformer.wte.weight"
    assert not torch.equal(*(state["averages"][name] for state in ends.states))
    assert torch.equal(ends.states[1]["averages"][name], record.average(DECAY)[name])
    trials = ["run-0", "run-1"] if hp_name is None else ["trial0", "trial1"]
    for trial, state in zip(trials, ends.states, strict=True):
        stored = EMACallback(DECAY)
        stored._run.begin(new_gpt2(), again=False, may_begin_again=False)
        stored.ema_model.load(folder / trial / "checkpoint-6")
        assert torch.equal(stored.get_ema_state()["averages"][name], state["averages"][name])
    where = [folder / "ema"] if hp_name is None else [folder / trial / "ema" for trial in trials]
    assert all((place / "model.safetensors").exists() for place in where)
