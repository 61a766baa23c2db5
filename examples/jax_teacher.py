# ruff: noqa: INP001  # a page to read and run, no package
"""A mean teacher in nnx: the average of a student teaches it to agree with itself.

Of 1 500 digits 100 have a label. The student learns these, and on all of them to say about one noisy
copy of an image what the teacher says about another. The teacher is the average of the student
(Tarvainen and Valpola 2017, arXiv:1703.01780), with the momentum of BYOL (``CosineDecay``) and no
gradient; both run in the same compiled step. ``torch_teacher.py`` is the same page for PyTorch.

    python examples/jax_teacher.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import ema
from ema.jax_backend.nnx import EMA

STEPS, BATCH, LABELED, TRAINED, NOISE = 800, 228, 100, 1500, 0.3


class Network(nnx.Module):
    """Two hidden layers of 64."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of images, (n, 64) to (n, 10)."""
        return self.out(nnx.relu(self.second(nnx.relu(self.first(x)))))


@nnx.jit(donate_argnames=("optimizer", "average"))
def train_step(
    student: Network,
    optimizer: nnx.Optimizer[Network],
    average: EMA,
    batch: tuple[jax.Array, jax.Array],
    key: jax.Array,
) -> jax.Array:
    """One step: the teacher is called with the averaged weights, the student learns from both."""
    images, labels = batch
    one, other = NOISE * jax.random.normal(key, (2, *images.shape))
    teacher = average.apply_to(student)
    targets = jax.lax.stop_gradient(nnx.softmax(teacher(images + one)))
    has_label = labels >= 0

    def loss_of(student: Network) -> jax.Array:
        logits = student(images + other)
        supervised = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        agreement = jnp.mean(jnp.sum((nnx.softmax(logits) - targets) ** 2, axis=-1))
        return jnp.sum(supervised * has_label) / jnp.maximum(has_label.sum(), 1) + 3.0 * agreement

    loss, grads = nnx.value_and_grad(loss_of)(student)
    optimizer.update(student, grads)
    average.update(student)
    return loss


def main(steps: int = STEPS) -> dict[str, float]:
    """Train, and give the accuracy of student and teacher on the last 297 digits."""
    digits = load_digits()
    images, labels = jnp.asarray(digits.data / 16.0, jnp.float32), jnp.asarray(digits.target)
    known = jnp.where(jnp.arange(TRAINED) < LABELED, labels[:TRAINED], -1)

    student = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(student, optax.adam(2e-3), wrt=nnx.Param)
    average = EMA(student, ema.CosineDecay(start=0.95, end=1.0, total_steps=steps))
    teacher = average.apply_to(student)  # follows every update

    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(0), step)
        some = jax.random.choice(key, TRAINED, (BATCH - LABELED,), replace=False)
        chosen = jnp.concatenate([jnp.arange(LABELED), some])
        train_step(student, optimizer, average, (images[chosen], known[chosen]), key)

    def accuracy(model: Network) -> float:
        return float(jnp.mean(model(images[TRAINED:]).argmax(-1) == labels[TRAINED:]))

    return {"student": accuracy(student), "teacher": accuracy(teacher)}


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {100 * value:.1f} % of the digits it has not seen")
