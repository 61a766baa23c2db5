"""A whole optimizer step in JAX, with and without an average of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.measure import Case, Contender
from benchmarks.peers import DECAY
from ema.jax_backend import params_ema

__all__ = ["build"]

LEAVES = 12


def build(*, quick: bool) -> Case:
    shape = (512, 1024) if quick else (2048, 2048)
    keys = jax.random.split(jax.random.key(0), LEAVES)
    grads = [1e-3 * jax.random.normal(key, shape) for key in keys]

    def fresh() -> list[jax.Array]:
        return [jnp.copy(leaf) for leaf in grads]

    return Case(
        title=f"adamw step in JAX, donated: {LEAVES * shape[0] * shape[1] / 1e6:.3g} M float32"
        f" in {LEAVES} leaves",
        contenders=[
            _contender("ema in the chain", _chained(params_ema(DECAY)), grads, fresh(), "ours"),
            _contender("incremental_update", _with_incremental_update, grads, fresh(), "peer"),
            _contender("nnx.EMA", _with_nnx, grads, fresh(), "peer"),
            _contender("no average", _chained(optax.identity()), grads, fresh(), "limit"),
        ],
        references=["no average"],
    )


Step = Callable[[Any, Any], Any]


def _contender(
    name: str,
    make: Callable[[list[jax.Array]], tuple[Any, Step]],
    grads: list[jax.Array],
    params: list[jax.Array],
    kind: str,
) -> Contender:
    """Run ``state = step(state, grads)``; every array is donated and lives in the state."""
    state, step = make(params)

    def call() -> None:
        nonlocal state
        state = step(state, grads)

    return Contender(name=name, call=call, finish=lambda: jax.block_until_ready(state), kind=kind)


def _chained(link: optax.GradientTransformation) -> Callable[[list[jax.Array]], tuple[Any, Step]]:
    """Adamw with one more link; the state is (params, optimizer state)."""
    tx = optax.chain(optax.adamw(1e-3), link)

    def step(state: Any, grads: list[jax.Array]) -> Any:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return lambda params: ((params, tx.init(params)), jax.jit(step, donate_argnums=0))


def _with_incremental_update(params: list[jax.Array]) -> tuple[Any, Step]:
    """The step, then the average in a second jitted call."""
    state, step = _chained(optax.identity())(params)
    average = [jnp.copy(leaf) for leaf in params]
    update = jax.jit(
        lambda average, params: optax.incremental_update(params, average, 1 - DECAY),
        donate_argnums=0,
    )

    def both(state: Any, grads: list[jax.Array]) -> Any:
        inner, average = state
        inner = step(inner, grads)
        return inner, update(average, inner[0])

    return (state, average), both


def _with_nnx(params: list[jax.Array]) -> tuple[Any, Step]:
    """An ``nnx.Optimizer`` step and ``nnx.EMA`` in one ``nnx.jit``, as its documentation has it."""
    model = nnx.List([nnx.Param(leaf) for leaf in params])
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    average = nnx.EMA(model, decay=DECAY)

    structure = jax.tree.structure(nnx.state(model, nnx.Param))

    @nnx.jit(donate_argnums=(0, 1, 2))
    def train(model: Any, optimizer: Any, average: Any, grads: list[jax.Array]) -> None:
        optimizer.update(model, structure.unflatten(grads))
        average.update(model)

    def step(state: Any, grads: list[jax.Array]) -> Any:
        train(*state, grads)
        return state

    return (model, optimizer, average), step
