# ruff: noqa: INP001  # a page to read and run, no package
"""A hand-written Accelerate loop with an averaged model: accumulate, checkpoint, resume, export.

    python examples/accelerate_loop.py FOLDER            # or: accelerate launch …
    python examples/accelerate_loop.py FOLDER --resume

Each line that has to do with the average is marked with ``# ema``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ema import EMAModel

EPOCHS = 4


def data() -> TensorDataset:
    """Noisy points around a sine."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(512, 1, generator=generator) * 6 - 3
    return TensorDataset(x, x.sin() + 0.3 * torch.randn(512, 1, generator=generator))


def main(folder: Path, *, resume: bool = False, stop_after: int = EPOCHS) -> tuple[float, float]:
    """Train, and return the loss of the live and of the averaged weights on the clean sine."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=4)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    loader = DataLoader(data(), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    ema_model = EMAModel(model, decay=0.95)  # ema: of the prepared model
    accelerator.register_for_checkpointing(ema_model)  # ema

    first = 0
    if resume:
        last = max(folder.glob("epoch-*"), key=lambda path: int(path.name.removeprefix("epoch-")))
        accelerator.load_state(str(last))  # ema: loads the average too
        first = int(last.name.removeprefix("epoch-"))

    for epoch in range(first, stop_after):
        set_seed(epoch)  # the same order of the data, resumed or not
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                ema_model.update()  # ema: after every real step
        accelerator.save_state(str(folder / f"epoch-{epoch + 1}"))  # ema: saves the average too

    x = torch.linspace(-3, 3, 200, device=accelerator.device).unsqueeze(1)
    with torch.no_grad():
        live = nn.functional.mse_loss(model(x), x.sin()).item()
        with ema_model.use_ema():  # ema
            averaged = nn.functional.mse_loss(model(x), x.sin()).item()
    if accelerator.is_main_process:
        ema_model.export(folder / "averaged.safetensors")  # ema: a plain state dict
    accelerator.print(f"{ema_model.count} updates; live {live:.5f}, averaged {averaged:.5f}")
    accelerator.end_training()
    return live, averaged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stop-after", type=int, default=EPOCHS, help="epochs")
    arguments = parser.parse_args()
    main(arguments.folder, resume=arguments.resume, stop_after=arguments.stop_after)
