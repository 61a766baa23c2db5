# ruff: noqa: INP001  # a page to read and run, no package
"""A mean teacher in PyTorch: the average of a student teaches it to agree with itself.

Of 1 500 digits 100 have a label. The student learns these, and on all of them to say about one noisy
copy of an image what the teacher says about another. The teacher is the average of the student
(Tarvainen and Valpola 2017, arXiv:1703.01780), with the momentum of BYOL (``CosineDecay``): an
``EMAModel`` is called like the model, and leaves the live weights alone. ``jax_teacher.py`` is the
same page for nnx.

    python examples/torch_teacher.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import ema

STEPS, BATCH, LABELED, TRAINED, NOISE = 800, 228, 100, 1500, 0.3


def network() -> nn.Module:
    """Two hidden layers of 64."""
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def train_step(
    teacher: ema.EMAModel[nn.Module],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    """One step: the teacher is called with the averaged weights, the student learns from both."""
    one, other = NOISE * torch.randn(2, *images.shape)
    targets = teacher(images + one).softmax(-1)  # carries no gradient
    logits = teacher.model(images + other)
    supervised = functional.cross_entropy(logits, labels, ignore_index=-1)
    agreement = (logits.softmax(-1) - targets).square().sum(-1).mean()
    loss = supervised + 3.0 * agreement

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    teacher.update()
    return loss.detach()


def main(steps: int = STEPS) -> dict[str, float]:
    """Train, and give the accuracy of student and teacher on the last 297 digits."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16.0).float(), torch.tensor(digits.target)
    known = torch.where(torch.arange(TRAINED) < LABELED, labels[:TRAINED], -1)

    student = network()
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    teacher = ema.EMAModel(student, ema.CosineDecay(start=0.95, end=1.0, total_steps=steps))

    for _ in range(steps):
        some = torch.randperm(TRAINED)[: BATCH - LABELED]
        chosen = torch.cat([torch.arange(LABELED), some])
        train_step(teacher, optimizer, images[chosen], known[chosen])

    def accuracy(logits: Tensor) -> float:
        return (logits.argmax(-1) == labels[TRAINED:]).float().mean().item()

    with torch.no_grad():
        unseen = images[TRAINED:]
        return {"student": accuracy(student(unseen)), "teacher": accuracy(teacher(unseen))}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {100 * value:.1f} % of the digits it has not seen")
