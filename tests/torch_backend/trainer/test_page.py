"""The code blocks of docs/trainer.md run, one after the other, and do what the page says."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

PAGE = Path(__file__).parents[3] / "docs" / "trainer.md"


@pytest.mark.filterwarnings("ignore:.* will still be the initial weights")  # in so few steps
def test_the_blocks_of_the_page_run(new_gpt2, tokens, tmp_path, monkeypatch):
    """In a folder of their own, with checkpoints every ten steps."""
    monkeypatch.chdir(tmp_path)
    options = {
        "max_steps": 40,
        "save_strategy": "steps",
        "save_steps": 10,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    names = {
        "torch": torch,
        "Trainer": Trainer,
        "model": new_gpt2(),
        "new_model": lambda: new_gpt2(seed=1),
        "dataset": tokens(16),
        "args": TrainingArguments("run", **options),
        "evaluating_args": TrainingArguments(
            "evaluated", eval_strategy="steps", eval_steps=20, **{**options, "save_strategy": "no"}
        ),
        "preemptible_args": TrainingArguments("preemptible", enable_jit_checkpoint=True, **options),
        "elsewhere": "elsewhere",
    }
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 10
    for block in blocks:
        if "resume_from_checkpoint=True" in block:
            shutil.rmtree("run/checkpoint-40")
        if "elsewhere" in block:
            shutil.copytree("run/checkpoint-20", "elsewhere/checkpoint-20")
        if "import last_complete" in block:
            Path("run/checkpoint-40/ema.safetensors").unlink()
        exec(block, names)
        if "train()" in block or "resume_from" in block:
            assert names["trainer"].state.global_step == 40
    assert names["averaged_loss"] < 4
    assert names["ema_callback"].ema_model.count == 40
    assert names["slow"].ema_model.count == 40
    assert names["averaged"].config.n_embd == 16
