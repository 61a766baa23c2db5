"""Optimizer steps in JAX, with and without an average of the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.setting import DECAY, Setting
from benchmarks.timing import Case, Contender
from ema.jax_backend import params_ema

LEAVES = {"full": 12, "quick": 12, "tiny": 2}
SHAPES = {"full": (2048, 2048), "quick": (512, 1024), "tiny": (16, 16)}
LENGTHS = {"full": 1_000, "quick": 100, "tiny": 20}

Arrays = list[jax.Array]
Steps = tuple[Any, Callable[[Any], Any]]
"""A first state, and a step from one state to the next."""


def adamw(setting: Setting) -> Case:
    """A whole step of adamw."""
    return _step("adamw", optax.adamw(1e-3), setting, bar=0.6)


def sgd(setting: Setting) -> Case:
    """A whole step of sgd."""
    return _step("sgd", optax.sgd(1e-3), setting, bar=0.8)


def _step(
    title: str, optimizer: optax.GradientTransformation, setting: Setting, *, bar: float
) -> Case:
    grads = _grads(SHAPES[setting.size], setting)
    separate, donated = (_incremental(grads, optimizer, donate=donate) for donate in (False, True))
    return Case(
        title=f"{title} step in JAX, donated: {_size(grads)}",
        contenders=[
            _contender("ema in the chain", "ours", _chained(grads, optimizer, params_ema(DECAY))),
            _contender("incremental_update", "peer", separate),
            _contender("incremental_update, donated", "peer", donated),
            _contender("nnx.EMA", "peer", _nnx(grads, optimizer)),
            _contender("no average", "limit", _chained(grads, optimizer)),
        ],
        references=["no average"],
        added=True,
        note=f"Bar: ema adds at most {bar} of what incremental_update and nnx.EMA add; they stand at"
        f" {1 / bar:.2f} or more in the last column.",
    )


def scan(setting: Setting) -> Case:
    """A thousand steps in one ``lax.scan``."""
    return _scan((512, 512), setting)


def small_scan(setting: Setting) -> Case:
    """The same with small leaves."""
    return _scan((256, 256), setting)


def _scan(shape: tuple[int, int], setting: Setting) -> Case:
    grads = _grads((16, 16) if setting.size == "tiny" else shape, setting)
    length = LENGTHS[setting.size]

    def contender(name: str, kind: str, *links: optax.GradientTransformation) -> Contender:
        return _contender(name, kind, _chained(grads, optax.sgd(1e-3), *links, length=length))

    return Case(
        title=f"{length} steps of sgd in one lax.scan: {_size(grads)}",
        contenders=[
            contender("update_every=1", "ours", params_ema(DECAY)),
            contender("update_every=10", "ours", params_ema(DECAY, update_every=10)),
            contender("no average", "limit"),
        ],
        references=["no average"],
        added=True,
        note="Bar: update_every=10 adds at most 0.3 of what update_every=1 adds.",
    )


def _grads(shape: tuple[int, int], setting: Setting) -> Arrays:
    keys = jax.random.split(jax.random.key(0), LEAVES[setting.size])
    return [1e-3 * jax.random.normal(key, shape) for key in keys]


def _size(leaves: Arrays) -> str:
    return f"{sum(leaf.size for leaf in leaves) / 1e6:.3g} M float32 in {len(leaves)} leaves"


def _contender(name: str, kind: str, steps: Steps) -> Contender:
    """One step after another; every array is donated and lives in the state."""
    state, step = steps

    def call() -> None:
        nonlocal state
        state = step(state)

    return Contender(name, call, finish=lambda: jax.block_until_ready(state), kind=kind)


def _chained(
    grads: Arrays, *links: optax.GradientTransformation, length: int | None = None
) -> Steps:
    """The links in a chain, one step or a scan of ``length`` steps at a time."""
    tx, params = optax.chain(*links), _params(grads)

    def step(state: Any, grads: Arrays) -> Any:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def steps(state: Any, grads: Arrays) -> Any:
        return jax.lax.scan(lambda s, _: (step(s, grads), None), state, length=length)[0]

    jitted = jax.jit(step if length is None else steps, donate_argnums=0)
    return (params, tx.init(params)), lambda state: jitted(state, grads)


def _incremental(grads: Arrays, optimizer: optax.GradientTransformation, *, donate: bool) -> Steps:
    """The step, then the average in a second jitted call."""
    first, step = _chained(grads, optimizer)
    update = jax.jit(
        lambda average, params: optax.incremental_update(params, average, 1 - DECAY),
        donate_argnums=(0,) if donate else (),
    )

    def both(state: Any) -> Any:
        inner, average = state
        inner = step(inner)
        return inner, update(average, inner[0])

    return (first, _params(grads)), both


def _nnx(grads: Arrays, optax_optimizer: optax.GradientTransformation) -> Steps:
    """An ``nnx.Optimizer`` step and ``nnx.EMA`` in one ``nnx.jit``, as its documentation has it."""

    def both(model: Any, optimizer: Any, average: Any, grads: Any) -> None:
        optimizer.update(model, grads)
        average.update(model)

    train: Callable[..., None] = nnx.jit(both, donate_argnums=(0, 1, 2))

    model = nnx.List([nnx.Param(leaf) for leaf in _params(grads)])
    optimizer = nnx.Optimizer(model, optax_optimizer, wrt=nnx.Param)
    average = nnx.EMA(model, decay=DECAY)
    structure = jax.tree.structure(nnx.state(model, nnx.Param))

    def step(state: Any) -> Any:
        train(*state, structure.unflatten(grads))
        return state

    return (model, optimizer, average), step


def _params(grads: Arrays) -> Arrays:
    """Arrays of their own, which can be donated."""
    return [jnp.copy(leaf) for leaf in grads]
