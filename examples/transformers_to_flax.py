# ruff: noqa: D101, D103, INP001  # a page to read and run, no package
"""A transformers model's average, moved into a Flax model, which goes on from there, and back.

    python examples/transformers_to_flax.py

The two models have the same modules; what differs is how Flax calls a weight and how it lays a
linear layer out. ``rename`` and ``transform`` say just that, and the file knows the rest: step,
count and averages go over to the last bit.
"""

from __future__ import annotations

import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from transformers import DistilBertConfig, DistilBertModel

from ema import EMAModel, HalfLife
from ema.jax_backend import get_params_ema, load_params_ema, params_ema, save_params_ema

CONFIG = DistilBertConfig(
    vocab_size=64,
    max_position_embeddings=16,
    dim=16,
    n_layers=2,
    n_heads=2,
    hidden_dim=32,
    dropout=0.0,
    attention_dropout=0.0,
)
SCHEDULE = HalfLife(steps=10)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 12))


class Embeddings(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.word_embeddings = nnx.Embed(CONFIG.vocab_size, CONFIG.dim, rngs=rngs)
        self.position_embeddings = nnx.Embed(CONFIG.max_position_embeddings, CONFIG.dim, rngs=rngs)
        self.LayerNorm = nnx.LayerNorm(CONFIG.dim, epsilon=1e-12, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[-1])
        return self.LayerNorm(self.word_embeddings(tokens) + self.position_embeddings(positions))


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        for name in ("q_lin", "k_lin", "v_lin", "out_lin"):
            setattr(self, name, nnx.Linear(CONFIG.dim, CONFIG.dim, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = (*x.shape[:-1], CONFIG.n_heads, -1)
        q, k, v = (lin(x).reshape(heads) for lin in (self.q_lin, self.k_lin, self.v_lin))
        return self.out_lin(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))


class FeedForward(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.lin1 = nnx.Linear(CONFIG.dim, CONFIG.hidden_dim, rngs=rngs)
        self.lin2 = nnx.Linear(CONFIG.hidden_dim, CONFIG.dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lin2(jax.nn.gelu(self.lin1(x), approximate=False))


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = Attention(rngs)
        self.sa_layer_norm = nnx.LayerNorm(CONFIG.dim, epsilon=1e-12, rngs=rngs)
        self.ffn = FeedForward(rngs)
        self.output_layer_norm = nnx.LayerNorm(CONFIG.dim, epsilon=1e-12, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.sa_layer_norm(x + self.attention(x))
        return self.output_layer_norm(x + self.ffn(x))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.List([Layer(rngs) for _ in range(CONFIG.n_layers)])


class Encoder(nnx.Module):
    """DistilBERT in Flax, its modules called as in transformers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embeddings = Embeddings(rngs)
        self.transformer = Transformer(rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embeddings(tokens)
        for layer in self.transformer.layer:
            x = layer(x)
        return x


def to_flax(name: str) -> str:
    """``…LayerNorm.weight`` is a scale, ``…_embeddings.weight`` an embedding, others kernels."""
    name = re.sub(r"(layer_norm|LayerNorm)\.weight$", r"\1.scale", name)
    name = re.sub(r"_embeddings\.weight$", "_embeddings.embedding", name)
    return re.sub(r"\.weight$", ".kernel", name)


def to_torch(name: str) -> str:
    return re.sub(r"\.(scale|embedding|kernel)$", ".weight", name)


def transpose_kernels(name: str, array: np.ndarray) -> np.ndarray:
    return array.T if name.endswith(".kernel") else array


def transpose_linear(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T if re.search(r"(_lin|lin\d)\.weight$", name) else tensor


def main() -> dict[str, float]:
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()

    # train in PyTorch
    model = DistilBertModel(CONFIG).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = EMAModel(model, SCHEDULE)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.from_numpy(TOKENS)).last_hidden_state.pow(4).mean().backward()
        optimizer.step()
        average.update()
    average.save(folder)
    with average.use_ema(), torch.no_grad():
        expected = model(torch.from_numpy(TOKENS)).last_hidden_state.numpy()

    # go on in Flax, from the averaged weights
    encoder = Encoder(nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), params_ema(SCHEDULE))
    optimizer = nnx.Optimizer(encoder, tx, wrt=nnx.Param)
    optimizer.opt_state = load_params_ema(
        folder, optimizer.opt_state, rename=to_flax, transform=transpose_kernels
    )
    nnx.update(encoder, get_params_ema(optimizer.opt_state, nnx.state(encoder, nnx.Param)))
    error = float(np.abs(np.asarray(encoder(TOKENS)) - expected).max())

    @nnx.jit
    def step(encoder: Encoder, optimizer: nnx.Optimizer) -> None:
        grads = nnx.grad(lambda encoder: jnp.mean(encoder(TOKENS) ** 4))(encoder)
        optimizer.update(encoder, grads)

    for _ in range(20):
        step(encoder, optimizer)
    save_params_ema(folder, optimizer.opt_state, decay=SCHEDULE)

    # and back
    average.load(folder, rename=to_torch, transform=transpose_linear)
    nnx.update(encoder, get_params_ema(optimizer.opt_state, nnx.state(encoder, nnx.Param)))
    with average.use_ema(), torch.no_grad():
        output = model(torch.from_numpy(TOKENS)).last_hidden_state.numpy()
    back = float(np.abs(np.asarray(encoder(TOKENS)) - output).max())
    return {"step": average.step, "to Flax": error, "and back": back}


if __name__ == "__main__":
    for what, value in main().items():
        print(
            f"{what}: {value:.3g}" if what == "step" else f"{what}: outputs differ by {value:.1e}"
        )
