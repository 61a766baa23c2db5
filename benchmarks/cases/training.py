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
    kind: dict[str, Any] = {"device": setting.device, "dtype": dtype}
    heads = max(1, width // 128)
    options = {"dropout": 0.0, "batch_first": True, **kind}
    model = nn.Sequential(
        *(nn.TransformerEncoderLayer(width, heads, 4 * width, **options) for _ in range(layers))
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    batch = torch.randn(sequences, length, width, **kind)

    def contender(name: str, update: Callable[[], object], kind: str) -> Contender:
        def call() -> None:
            for _ in range(STEPS):
                model(batch).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                update()

        return Contender(name=name, call=call, kind=kind)

    return Case(
        title=f"{STEPS} training steps of {sequences * length} tokens: {count(model) / 1e6:.3g} M"
        f" {str(dtype).removeprefix('torch.')}, AdamW",
        contenders=[
            *(
                contender(name, EMAModel(model, DECAY, **options).update, "ours")
                for name, options in BESIDE.items()
            ),
            contender("no average", int, "limit"),
        ],
        references=["no average"],
        baseline="no average",
        unit="ema",
        finish=setting.finish,
        note="Bar: overlap adds at most 2 % to a step." * (not setting.on_cpu),
    )


def trainer(setting: Setting) -> Case:
    """A run of the Hugging Face ``Trainer`` with and without the callback, whose decay suits it."""
    model = gpt2(setting)
    plain, averaging = _trainer(model, []), _trainer(model, [EMACallback(0.5)])
    return Case(
        title=f"{STEPS} steps of the Trainer: GPT-2, {size(model)}, sgd",
        contenders=[
            Contender(name="EMACallback", call=averaging.train, kind="ours"),
            Contender(name="no average", call=plain.train, kind="limit"),
        ],
        references=["no average"],
        baseline="no average",
        unit="EMACallback",
        finish=setting.finish,
        note="Each run starts a new average, which copies the weights.",
    )


def _trainer(model: Any, callbacks: list[Any]) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(0, model.config.vocab_size, (STEPS, 16))
    arguments = TrainingArguments(
        tempfile.gettempdir(),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        optim="sgd",
        save_strategy="no",
        report_to=[],
        use_cpu=next(model.parameters()).device.type == "cpu",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
