"""Whole training steps in PyTorch, with and without an average beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.models import count, gpt2, size
from benchmarks.setting import DECAY, Setting
from benchmarks.timing import Case, Contender
from ema import EMACallback, EMAModel

STEPS = 4
"""Steps in a sample: an update that overlaps with the next step needs a next step."""

BESIDE: Mapping[str, Mapping[str, Any]] = {
    "ema": {},
    "ema, overlap": {"overlap": True},
    'ema, on_nonfinite="skip"': {"on_nonfinite": "skip"},
    'ema, on_nonfinite="raise"': {"on_nonfinite": "raise"},
    "ema in host memory": {"device": "cpu"},
}


def step(setting: Setting) -> Case:
    """On an accelerator a step of 16 384 tokens, which keeps it busy for long."""
    return _step(setting, sequences=32)


def short_step(setting: Setting) -> Case:
    """On an accelerator a step of 4 096 tokens: the shorter it is, the more an update counts."""
    return _step(setting, sequences=8)


def _step(setting: Setting, *, sequences: int) -> Case:
    """Encoder layers and a fused AdamW, in bfloat16 on an accelerator; all train the same model."""
    layers, width, length, dtype = 16, 2048, 512, torch.bfloat16
    if setting.on_cpu:
        layers, width, length, dtype = 2, 256, 8, torch.float32
    if setting.size == "tiny":
        layers, width, length, sequences = 1, 16, 2, 1
    place: dict[str, Any] = {"device": setting.device, "dtype": dtype}
    layer = {"nhead": max(1, width // 128), "dim_feedforward": 4 * width, "dropout": 0.0, **place}
    model = nn.Sequential(
        *(nn.TransformerEncoderLayer(width, batch_first=True, **layer) for _ in range(layers))
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    batch = torch.randn(sequences, length, width, **place)

    def contender(name: str, update: Callable[[], object], kind: str = "ours") -> Contender:
        def call() -> None:
            for _ in range(STEPS):
                model(batch).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                update()

        return Contender(name, call, kind=kind)

    averages = {name: EMAModel(model, DECAY, **options) for name, options in BESIDE.items()}
    return Case(
        title=f"{STEPS} training steps of {sequences * length} tokens: {count(model) / 1e6:.3g} M"
        f" {str(dtype).removeprefix('torch.')}, AdamW",
        contenders=[
            *(contender(name, average.update) for name, average in averages.items()),
            contender("no average", int, "limit"),
        ],
        references=["no average"],
        added=True,
        note="Bar: overlap adds at most 2 % to a step." * (not setting.on_cpu),
    )


def trainer(setting: Setting) -> Case:
    """A run of the Hugging Face ``Trainer`` with and without the callback, whose decay suits it."""
    from transformers import Trainer, TrainingArguments

    model: Any = gpt2(setting)
    rows = torch.randint(0, model.config.vocab_size, (STEPS, 16))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        tempfile.gettempdir(),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        optim="sgd",
        save_strategy="no",
        report_to=[],
        use_cpu=setting.on_cpu,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    plain, averaging = (
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
        for callbacks in ([], [EMACallback(0.5)])
    )
    return Case(
        title=f"{STEPS} steps of the Trainer: GPT-2, {size(model)}, sgd",
        contenders=[
            Contender("EMACallback", averaging.train, kind="ours"),
            Contender("no average", plain.train, kind="limit"),
        ],
        references=["no average"],
        added=True,
        note="Each run starts a new average, which copies the weights.",
    )
