"""A whole optimizer step in JAX, with and without an average of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.measure import Case, Contender
from benchmarks.setting import DECAY, Setting
from ema.jax_backend import params_ema

__all__ = ["build", "build_sgd"]

LEAVES = {"full": 12, "quick": 12, "tiny": 2}
SHAPES = {"full": (2048, 2048), "quick": (512, 1024), "tiny": (16, 16)}


def build(setting: Setting) -> Case:
    return _build("adamw", optax.adamw(1e-3), setting, bar=0.6)


def build_sgd(setting: Setting) -> Case:
    return _build("sgd", optax.sgd(1e-3), setting, bar=0.8)


def _build(
    title: str, optimizer: optax.GradientTransformation, setting: Setting, *, bar: float
) -> Case:
    shape, leaves = SHAPES[setting.size], LEAVES[setting.size]
    keys = jax.random.split(jax.random.key(0), leaves)
    grads = [1e-3 * jax.random.normal(key, shape) for key in keys]

    def fresh() -> list[jax.Array]:
        return [jnp.copy(leaf) for leaf in grads]

    return Case(
        title=f"{title} step in JAX, donated: {leaves * shape[0] * shape[1] / 1e6:.3g} M float32"
        f" in {leaves} leaves",
        contenders=[
            _contender(name, make, grads, fresh(), kind)
            for name, make, kind in (
                ("ema in the chain", _chained(optimizer, params_ema(DECAY)), "ours"),
                ("incremental_update", _with_incremental_update(optimizer, donate=False), "peer"),
                (
                    "incremental_update, donated",
                    _with_incremental_update(optimizer, donate=True),
                    "peer",
                ),
                ("nnx.EMA", _with_nnx(optimizer), "peer"),
                ("no average", _chained(optimizer, optax.identity()), "limit"),
            )
        ],
        references=["no average"],
        baseline="no average",
        unit="ema in the chain",
        note=f"Bar: ema adds at most {bar} of what incremental_update and nnx.EMA add; they stand at"
        f" {1 / bar:.2f} or more in the last column.",
    )


Step = Callable[[Any, Any], Any]
Make = Callable[[list[jax.Array]], tuple[Any, Step]]


def _contender(
    name: str,
    make: Make,
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


def _chained(optimizer: optax.GradientTransformation, link: optax.GradientTransformation) -> Make:
    """The optimizer with one more link; the state is (params, optimizer state)."""
    tx = optax.chain(optimizer, link)

    def step(state: Any, grads: list[jax.Array]) -> Any:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return lambda params: ((params, tx.init(params)), jax.jit(step, donate_argnums=0))


def _with_incremental_update(optimizer: optax.GradientTransformation, *, donate: bool) -> Make:
    """The step, then the average in a second jitted call."""
    update = jax.jit(
        lambda average, params: optax.incremental_update(params, average, 1 - DECAY),
        donate_argnums=(0,) if donate else (),
    )

    def make(params: list[jax.Array]) -> tuple[Any, Step]:
        state, step = _chained(optimizer, optax.identity())(params)

        def both(state: Any, grads: list[jax.Array]) -> Any:
            inner, average = state
            inner = step(inner, grads)
            return inner, update(average, inner[0])

        return (state, [jnp.copy(leaf) for leaf in params]), both

    return make


def _with_nnx(optax_optimizer: optax.GradientTransformation) -> Make:
    """An ``nnx.Optimizer`` step and ``nnx.EMA`` in one ``nnx.jit``, as its documentation has it."""

    @nnx.jit(donate_argnums=(0, 1, 2))
    def train(model: Any, optimizer: Any, average: Any, grads: Any) -> None:
        optimizer.update(model, grads)
        average.update(model)

    def make(params: list[jax.Array]) -> tuple[Any, Step]:
        model = nnx.List([nnx.Param(leaf) for leaf in params])
        optimizer = nnx.Optimizer(model, optax_optimizer, wrt=nnx.Param)
        average = nnx.EMA(model, decay=DECAY)
        structure = jax.tree.structure(nnx.state(model, nnx.Param))

        def step(state: Any, grads: list[jax.Array]) -> Any:
            train(*state, structure.unflatten(grads))  # type: ignore[call-arg]
            return state

        return (model, optimizer, average), step

    return make
