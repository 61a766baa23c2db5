"""A small transformers model, built from its config, and real Trainer runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

CONFIG = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "vocab_size": 32,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "loss_type": "ForCausalLM",
}


class Recorder(TrainerCallback):
    """The live weights after every optimizer step; it stands before what swaps."""

    def __init__(self, model=None):
        self.history = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.history = []
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.history.append({n: p.detach().clone() for n, p in model.named_parameters()})

    def average(self, decay, step=None):
        """The recursion over those up to this step."""
        average = {name: value.clone() for name, value in self.history[0].items()}
        for live in self.history[1 : None if step is None else step + 1]:
            for name, value in live.items():
                average[name].lerp_(value, 1 - decay)
        return average


def known(options: dict) -> dict:
    """The options under the names that this release has for them."""
    new, old = "activation_checkpointing", "gradient_checkpointing"  # deprecated since the new one
    return {
        old if name == new and not hasattr(TrainingArguments, new) else name: value
        for name, value in options.items()
    }


@pytest.fixture
def recorder() -> type[Recorder]:
    """The class of the recording callback."""
    return Recorder


@pytest.fixture
def config() -> dict:
    """What the model is built from."""
    return CONFIG


@pytest.fixture
def new_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """Make a model; the same weights for the same seed."""

    def make(seed=0, **changes):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**{**CONFIG, **changes}))

    return make


@pytest.fixture
def gpt2(new_gpt2) -> GPT2LMHeadModel:
    """A small model with tied weights."""
    return new_gpt2()


@pytest.fixture
def tokens() -> Callable[[int, int], list]:
    """A data set of random tokens."""

    def make(count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, 32, (count, 8), generator=generator)
        # nothing predicts the first token: the Trainer would count it as a target
        labels = rows.clone()
        labels[:, 0] = -100
        return [{"input_ids": row, "labels": ls} for row, ls in zip(rows, labels, strict=True)]

    return make


@pytest.fixture
def make_trainer(tmp_path, tokens) -> Callable[..., Trainer]:
    """A real Trainer on random tokens, in a temporary folder."""

    def make(model, callbacks=(), steps=6, kind=Trainer, rows=24, eval_dataset=None, **options):
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return kind(
            model=model,
            args=TrainingArguments(**{**defaults, **known(options)}),
            train_dataset=tokens(rows),
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
        )

    return make


@pytest.fixture
def train(make_trainer) -> Callable[..., Trainer]:
    """Run one to its end."""

    def run(model, callbacks, resume=None, attach=None, **options):
        trainer = make_trainer(model, callbacks, **options)
        if attach is not None:
            attach.attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    """The output folder of the runs."""
    return tmp_path / "run"
