"""LoRA with the real peft: only adapters are averaged, saved and exported."""

from typing import ClassVar

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from ema import EMACallback

# peft asks transformers in words that it is about to drop
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def base(new_gpt2, tmp_path):
    """A model on the disk, where an adapter finds it."""
    folder = tmp_path / "base"
    new_gpt2().save_pretrained(folder)
    return folder


@pytest.fixture
def new_lora(base):
    def make(seed=0, **options):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=2,
            lora_dropout=0.1,
            target_modules=["c_attn", "c_fc"],
            fan_in_fan_out=True,
            task_type="CAUSAL_LM",
            **options,
        )
        return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)

    return make


def adapters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def test_only_what_trains_is_averaged(new_lora, train, recorder):
    """The base takes no memory, and its weights are never written."""
    model = new_lora()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    record, callback = recorder(), EMACallback(0.6)
    train(model, [record, callback])
    averages = callback.ema_model.averaged_parameters()
    assert averages.keys() == adapters(model).keys()
    expected = record.average(0.6)
    assert all(torch.equal(averages[name], expected[name]) for name in averages)
    # no memory beyond theirs
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in averages.values()}
    held = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    assert held == sum(tensor.nbytes for tensor in averages.values())
    with callback.use_ema(model):
        assert all(torch.equal(adapters(model)[name], expected[name]) for name in averages)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


def test_the_export_is_a_normal_adapter_folder(new_lora, train, base, tmp_path):
    """PeftModel.from_pretrained loads it onto the base; so does the model that was written last."""
    model = new_lora()
    callback = EMACallback(0.6, save_ema_model=True)
    train(model, [callback])
    callback.save_pretrained(model, tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "ema.json"} <= files
    assert "model.safetensors" not in files
    averages = callback.get_ema_state()["averages"]
    for folder in (tmp_path / "adapter", tmp_path / "run" / "ema"):
        again = AutoModelForCausalLM.from_pretrained(base)
        loaded = adapters(peft.PeftModel.from_pretrained(again, folder))
        assert loaded.keys() == averages.keys()
        assert all(torch.equal(loaded[name], averages[name]) for name in loaded)
    live = adapters(model)
    assert not all(torch.equal(live[name], averages[name]) for name in live)


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_evaluate_save_and_keep_the_best(new_lora, train, tokens, folder, recorder, attached):
    """Checkpoints hold live adapters beside their average; the best ones are kept at the end."""
    model = new_lora()
    record, callback = recorder(), EMACallback(0.6, eval_with_ema=True)
    trainer = train(
        model,
        [record, callback],
        attach=callback if attached else None,
        eval_dataset=tokens(8, seed=1),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        greater_is_better=True,
    )
    losses = {
        log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log
    }
    best = max(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    state, live = callback.get_ema_state(), adapters(model)
    expected = record.average(0.6, best)
    assert state["step"] == best
    assert state["averages"].keys() == live.keys()
    for name in live:
        assert torch.equal(state["averages"][name], expected[name])
        assert torch.equal(live[name], record.history[best][name])
    base = model.unload()
    for step in losses:
        again = peft.PeftModel.from_pretrained(base, folder / f"checkpoint-{step}")
        loaded = adapters(again)
        assert loaded.keys() == live.keys()
        assert all(torch.equal(loaded[name], record.history[step][name]) for name in loaded)
        base = again.unload()


def test_resumed_equals_uninterrupted(new_lora, train, folder):
    """Bit for bit: adapters, averages and counters."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    model, callback = new_lora(), EMACallback(0.6)
    train(model, [callback], **saving)
    other, again = new_lora(seed=1), EMACallback(0.6)
    train(other, [again], resume=str(folder / "checkpoint-3"), **saving)
    ours, theirs = again.get_ema_state(), callback.get_ema_state()
    assert (ours["step"], ours["count"]) == (6, 6)
    assert all(torch.equal(ours["averages"][n], a) for n, a in theirs["averages"].items())
    live = adapters(other)
    assert all(torch.equal(live[name], value) for name, value in adapters(model).items())


class Generating(Trainer):
    """Generates in its evaluations, which enters the model through the base that PEFT wraps."""

    generated: ClassVar[list] = []

    def prediction_step(self, model, inputs, *args, **kwargs):
        self.generated.append((generate(self.model, inputs["input_ids"]), adapters(self.model)))
        return super().prediction_step(model, inputs, *args, **kwargs)


def generate(model, tokens):
    """Four tokens from each beginning, with their scores."""
    found = model.generate(
        input_ids=tokens[:, :4],
        attention_mask=torch.ones_like(tokens[:, :4]),
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return torch.stack(found.scores)


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "attached"])
def test_generating_in_an_evaluation_sees_the_average(
    new_lora, train, tokens, recorder, attached, monkeypatch
):
    """Though it does not pass through the outermost module."""
    monkeypatch.setattr(Generating, "generated", [])
    model, rows = new_lora(), tokens(8, seed=1)
    record, callback = recorder(), EMACallback(0.6, eval_with_ema=True)
    train(
        model,
        [record, callback],
        attach=callback if attached else None,
        kind=Generating,
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=6,
    )
    ((scores, seen),) = Generating.generated
    average = {name: record.average(0.6)[name] for name in seen}
    assert all(torch.equal(seen[name], average[name]) for name in seen)
    other = new_lora().eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(average.get(name, parameter))
    assert torch.equal(scores, generate(other, torch.stack([row["input_ids"] for row in rows])))
    live = adapters(model)
    assert all(torch.equal(live[name], record.history[6][name]) for name in live)
