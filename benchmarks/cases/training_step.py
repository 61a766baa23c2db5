"""Whole training steps in PyTorch, with and without an average beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks.measure import Case, Contender
from benchmarks.models import count
from benchmarks.setting import DECAY, Setting
from ema.torch_backend import EMAModel

__all__ = ["build", "build_short"]

STEPS = 4
"""An update that overlaps with the next step needs a next step."""

BESIDE: Mapping[str, Mapping[str, object]] = {
    "ema": {},
    "ema, overlap": {"overlap": True},
    'ema, on_nonfinite="skip"': {"on_nonfinite": "skip"},
    'ema, on_nonfinite="raise"': {"on_nonfinite": "raise"},
    "ema in host memory": {"device": "cpu"},
}


def build(setting: Setting) -> Case:
    """On an accelerator a step of 16 384 tokens, which keeps it busy for long."""
    return _build(setting, sequences=32)


def build_short(setting: Setting) -> Case:
    """On an accelerator a step of 4 096 tokens: the shorter it is, the more an update counts."""
    return _build(setting, sequences=8)


def _build(setting: Setting, *, sequences: int) -> Case:
    """Encoder layers and a fused AdamW, in bfloat16 on an accelerator; all train the same model."""
    layers, width, length, dtype = 16, 2048, 512, torch.bfloat16
    if setting.on_cpu:
        layers, width, length, dtype = 2, 256, 8, torch.float32
    if setting.size == "tiny":
        layers, width, length, sequences = 1, 16, 2, 1
    kind = {"device": setting.device, "dtype": dtype}
    model = nn.Sequential(
        *(
            nn.TransformerEncoderLayer(
                width, max(1, width // 128), 4 * width, dropout=0.0, batch_first=True, **kind
            )
            for _ in range(layers)
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    batch = torch.randn(sequences, length, width, **kind)

    def contender(name: str, update: Callable[[], object] | None, kind: str) -> Contender:
        def call() -> None:
            for _ in range(STEPS):
                model(batch).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if update is not None:
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
            contender("no average", None, "limit"),
        ],
        references=["no average"],
        baseline="no average",
        unit="ema",
        finish=setting.finish,
        note="Bar: overlap adds at most 2 % to a step." * (not setting.on_cpu),
    )
