"""The JAX half: ``params_ema`` in an optax chain under ``nnx.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ema.demo import network
from ema.demo.data import Digits, batches
from ema.demo.result import Run, is_due, score
from ema.jax_backend import get_params_ema, params_ema

__all__ = ["Network", "train"]


class Network(nnx.Module):
    """The network of :mod:`ema.demo.network`."""

    def __init__(self) -> None:
        first, second, third = network.CHANNELS
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(first, second, (3, 3), strides=2, padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(second, third, (3, 3), strides=2, padding=1, rngs=rngs)
        self.head = nnx.Linear(2 * 2 * third, network.CLASSES, rngs=rngs)
        for name, values in network.first_weights().items():
            layer, kind = name.split(".")
            getattr(getattr(self, layer), kind)[...] = values

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits; images are (n, 8, 8, 1)."""
        x = nnx.relu(self.conv1(images))
        x = nnx.relu(self.conv2(x))
        return self.head(x.reshape(len(x), -1))


def train(
    digits: Digits, held_out: Digits, steps: int, decay: float, advance: Callable[[], None]
) -> Run:
    """Train for ``steps`` steps on the CPU; ``advance`` is called after each."""
    with jax.default_device(jax.devices("cpu")[0]):
        model, averaged_model = Network(), Network()
        tx = optax.chain(
            optax.adamw(network.LEARNING_RATE, weight_decay=network.WEIGHT_DECAY),
            params_ema(decay=decay),
        )
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        run = Run(backend="JAX", loop="Flax nnx + params_ema")
        images = jnp.asarray(held_out.images)
        _keep(run, model)
        for step, batch in enumerate(batches(digits, steps, network.BATCH_SIZE), start=1):
            _step(model, optimizer, jnp.asarray(batch.images), jnp.asarray(batch.labels))
            _keep(run, model)
            if is_due(step, steps):
                nnx.update(averaged_model, get_params_ema(optimizer.opt_state))
                run.steps.append(step)
                for scores, either in ((run.live, model), (run.averaged, averaged_model)):
                    logits = np.asarray(_logits(either, images))
                    scores.append(score(logits, held_out.labels))
            advance()
    return run


@nnx.jit
def _step(
    model: Network, optimizer: nnx.Optimizer[Network], images: jax.Array, labels: jax.Array
) -> None:
    def loss(model: Network) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        mean: jax.Array = losses.mean()
        return mean

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def _logits(model: Network, images: jax.Array) -> jax.Array:
    return model(images)


def _keep(run: Run, model: Network) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.as_pure(nnx.state(model, nnx.Param)))
    run.params.append(
        {
            jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
            for path, leaf in leaves
        }
    )
