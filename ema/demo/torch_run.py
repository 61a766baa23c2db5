"""The PyTorch half: ``EMACallback`` in the real ``transformers.Trainer``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 — as everyone calls it
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ema.demo import network
from ema.demo.data import Digits, batches
from ema.demo.result import Run, is_due, score
from ema.torch_backend import EMACallback

__all__ = ["Network", "train"]


class Network(nn.Module):
    """The network of :mod:`ema.demo.network`."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = network.CHANNELS
        self.conv1 = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(second, third, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * 2 * third, network.CLASSES)
        with torch.no_grad():
            for name, values in network.first_weights().items():
                tensor = torch.from_numpy(values)
                layer, kind = name.split(".")
                if kind == "kernel":  # (height, width, in, out), here (out, in, height, width)
                    tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T
                    kind = "weight"
                self.get_parameter(f"{layer}.{kind}").copy_(tensor)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and with ``labels`` the loss; images are (n, 8, 8, 1)."""
        x = images.permute(0, 3, 1, 2)
        x = self.conv1(x).relu()
        x = self.conv2(x).relu()
        logits = self.head(x.permute(0, 2, 3, 1).flatten(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels.long()), "logits": logits}


def train(
    digits: Digits, held_out: Digits, steps: int, decay: float, advance: Callable[[], None]
) -> Run:
    """Train for ``steps`` steps on the CPU; ``advance`` is called after each."""
    model = Network()
    run = Run(backend="PyTorch", loop="transformers.Trainer + EMACallback")
    ema_callback = EMACallback(decay=decay)
    watch = _Watch(run, model, ema_callback, held_out, advance)
    with tempfile.TemporaryDirectory() as folder, _one_thread():
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=network.BATCH_SIZE,
            learning_rate=network.LEARNING_RATE,
            weight_decay=network.WEIGHT_DECAY,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=_Examples(digits, steps),
            callbacks=[ema_callback, watch],  # in this order: the watch sees the new average
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return run


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring where the tensors are this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Examples(IterableDataset[dict[str, Any]]):
    """The examples of the batches, one by one: the Trainer's loader batches them again."""

    def __init__(self, digits: Digits, steps: int) -> None:
        self._digits, self._steps = digits, steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in batches(self._digits, self._steps, network.BATCH_SIZE):
            for image, label in zip(batch.images, batch.labels, strict=True):
                yield {"images": image, "labels": label}


class _Watch(TrainerCallback):
    """Keeps the weights of every step, and scores live and averaged ones now and then."""

    def __init__(
        self,
        run: Run,
        model: Network,
        ema_callback: EMACallback,
        held_out: Digits,
        advance: Callable[[], None],
    ) -> None:
        self._run, self._model, self._ema_callback = run, model, ema_callback
        self._images, self._labels = torch.from_numpy(held_out.images), held_out.labels
        self._advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        self._keep()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, control, kwargs
        self._keep()
        if is_due(state.global_step, state.max_steps):
            self._run.steps.append(state.global_step)
            self._run.live.append(score(self._logits(), self._labels))
            with self._ema_callback.use_ema():
                self._run.averaged.append(score(self._logits(), self._labels))
        self._advance()

    def _keep(self) -> None:
        named = self._model.named_parameters()
        self._run.params.append({name: p.detach().numpy().copy() for name, p in named})

    @torch.no_grad()
    def _logits(self) -> Any:
        return np.asarray(self._model(self._images)["logits"])
