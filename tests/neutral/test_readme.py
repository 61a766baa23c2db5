"""Every code block of the README runs."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line.removeprefix("$ ").partition("#")[0].strip()
    for language, code in BLOCKS
    if language == "console"
    for line in code.splitlines()
]


def torch_names(folder):
    """What a block with PyTorch takes for granted."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    return {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_function": nn.functional.mse_loss,
        "loader": [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(5)],
        "inputs": torch.randn(3, 4),
    }


def trainer_names(folder):
    """What a block with the Trainer takes for granted."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    config = GPT2Config(
        n_layer=1,
        n_embd=8,
        n_head=2,
        vocab_size=16,
        n_positions=8,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    args = TrainingArguments(
        folder,
        max_steps=300,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    tokens = torch.randint(0, 16, (16, 8))
    return {
        "torch": torch,
        "Trainer": Trainer,
        "model": GPT2LMHeadModel(config),
        "args": args,
        "dataset": [{"input_ids": row, "labels": row} for row in tokens],
    }


def jax_names(folder):
    """What a block with optax takes for granted."""
    import jax
    import jax.numpy as jnp
    import optax

    return {
        "jax": jax,
        "optax": optax,
        "params": {"w": jnp.ones((4, 2))},
        "loss_function": lambda params, batch: jnp.sum((batch @ params["w"]) ** 2),
        "batches": [jnp.ones((3, 4))] * 5,
    }


def names_for(code, folder):
    if "optax" in code:
        return jax_names(folder)
    return trainer_names(folder) if "allback" in code else torch_names(folder)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run_and_do_what_they_say(number, tmp_path, monkeypatch):
    """Each block runs after those that define what it uses."""
    monkeypatch.chdir(tmp_path)
    code = PYTHON[number]
    names = names_for(code, tmp_path)
    if "get_ema_state" in code:  # goes on from the Trainer's block
        exec(next(block for block in PYTHON if "Trainer(" in block), names)
    exec(code, names)
    if "update()" in code:
        assert names["ema_model"].count == 5
    if "Trainer(" in code:
        assert names["ema_callback"].ema_model.count == 300
    if "averaged" in names:
        assert names["averaged"]["w"].shape == (4, 2)
    if "compute_optimal_decay" in code:
        assert round(names["decay"], 8) == 0.99930709


def test_all_blocks_are_covered():
    assert {language for language, _ in BLOCKS} == {"python", "console"}
    assert len(PYTHON) == 6
    assert len(COMMANDS) == 5


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command):
    """`ema …` runs; a make target, which would run this test again, is one that make knows."""
    words = shlex.split(command)
    if words[0] == "make":
        words.insert(1, "--dry-run")
    else:
        words[0] = str(Path(sys.executable).with_name("ema"))
    processes.run(words, cwd=ROOT)
