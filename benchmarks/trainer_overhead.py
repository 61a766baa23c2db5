"""What ``EMACallback`` adds to a Trainer run beyond the update itself, and its memory in evaluation.

    python -m benchmarks.trainer_overhead

One run of a GPT-2 with 124 M parameters on random tokens, on the CPU. Steps differ by more from one
to the next than the callback takes, so it is not the difference of two runs that is measured, but
the time that the Trainer spends in the callback's events, and within them that of the update.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any, Self

import psutil
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ema import EMACallback, EMAModel


class Clock:
    """Seconds within some functions, each call of each."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = {}

    def time(self, name: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.calls.setdefault(name, []).append(time.perf_counter() - begun)

        return timed


class Peak:
    """The largest resident memory of this process within the block, in bytes."""

    def __enter__(self) -> Self:
        self.process = psutil.Process()
        self.before = self.most = self.process.memory_info().rss
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.most = max(self.most, self.process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def run(folder: Path, steps: int, layers: int) -> None:
    """Measure, and print."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers))
    size = sum(parameter.numel() for parameter in model.parameters())
    rows = torch.randint(0, 50257, (steps, 16))
    clock = Clock()
    callback = EMACallback(0.5, eval_with_ema=True)
    events = [name for name in vars(EMACallback) if name.startswith("on_")]
    for name in events:
        setattr(callback, name, clock.time(name, getattr(callback, name)))
    update = EMAModel.update
    EMAModel.update = clock.time("update", update)  # type: ignore[method-assign]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder),
            max_steps=steps,
            per_device_train_batch_size=1,
            optim="sgd",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        eval_dataset=[{"input_ids": row, "labels": row} for row in rows[:2]],
        callbacks=[callback],
    )
    begun = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - begun
    EMAModel.update = update  # type: ignore[method-assign]
    per_step = ("on_step_begin", "on_pre_optimizer_step", "on_step_end")
    spent = sum(sum(clock.calls[name]) for name in per_step)
    updates = sum(clock.calls["update"])
    print(
        f"{size / 1e6:.1f} M parameters, {steps} steps, {wall:.1f} s ({wall / steps:.2f} s a step)"
    )
    print(
        f"update: median {median(clock.calls['update']) * 1e3:.1f} ms, {updates / wall:.2%} of the run"
    )
    print(f"callback beyond the update, steps: {(spent - updates) / wall:.4%} of the run")
    print(
        f"on_train_begin, once, with the copy of the weights: {clock.calls['on_train_begin'][0]:.3f} s"
    )
    trainer.evaluate()  # what an evaluation takes by itself
    with Peak() as plain:
        trainer.evaluate()
    callback.attach(trainer)
    trainer.evaluate()
    with Peak() as averaged:
        trainer.evaluate()
    for name, peak in (("live", plain), ("averaged", averaged)):
        added = (peak.most - peak.before) / (4 * size)
        print(f"evaluation with {name} weights: peak memory + {added:.1%} of the weights")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run(Path(place), arguments.steps, arguments.layers)
