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
Step = Callable[[Any, Any], Any]
Make = Callable[[Arrays], tuple[Any, Step]]


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
    makers: list[tuple[str, str, Make]] = [
        ("ema in the chain", "ours", _chained(optimizer, params_ema(DECAY))),
        ("incremental_update", "peer", _with_incremental_update(optimizer, donate=False)),
        ("incremental_update, donated", "peer", _with_incremental_update(optimizer, donate=True)),
        ("nnx.EMA", "peer", _with_nnx(optimizer)),
        ("no average", "limit", _chained(optimizer, optax.identity())),
    ]
    return Case(
        title=f"{title} step in JAX, donated: {_size(grads)}",
        contenders=[_contender(name, make, grads, kind) for name, kind, make in makers],
        references=["no average"],
        baseline="no average",
        unit="ema in the chain",
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
    links = {
        "update_every=1": params_ema(DECAY),
        "update_every=10": params_ema(DECAY, update_every=10),
        "no average": optax.identity(),
    }
    return Case(
        title=f"{length} steps of sgd in one lax.scan: {_size(grads)}",
        contenders=[
            _contender(
                name,
                _chained(optax.sgd(1e-3), link, length=length),
                grads,
                "limit" if name == "no average" else "ours",
            )
            for name, link in links.items()
        ],
        references=["no average"],
        baseline="no average",
        unit="update_every=1",
        note="Bar: update_every=10 adds at most 0.3 of what update_every=1 adds.",
    )


def _grads(shape: tuple[int, int], setting: Setting) -> Arrays:
    keys = jax.random.split(jax.random.key(0), LEAVES[setting.size])
    return [1e-3 * jax.random.normal(key, shape) for key in keys]


def _size(leaves: Arrays) -> str:
    return f"{sum(leaf.size for leaf in leaves) / 1e6:.3g} M float32 in {len(leaves)} leaves"


def _contender(name: str, make: Make, grads: Arrays, kind: str) -> Contender:
    """Run ``state = step(state, grads)``; every array is donated and lives in the state."""
    state, step = make([jnp.copy(leaf) for leaf in grads])

    def call() -> None:
        nonlocal state
        state = step(state, grads)

    return Contender(name=name, call=call, finish=lambda: jax.block_until_ready(state), kind=kind)


def _chained(
    optimizer: optax.GradientTransformation,
    link: optax.GradientTransformation,
    *,
    length: int | None = None,
) -> Make:
    """The optimizer with one more link, for one step or for a scan of ``length`` steps."""
    tx = optax.chain(optimizer, link)

    def step(state: Any, grads: Arrays) -> Any:
        params, opt_state = state
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def steps(state: Any, grads: Arrays) -> Any:
        return jax.lax.scan(lambda s, _: (step(s, grads), None), state, length=length)[0]

    jitted = jax.jit(step if length is None else steps, donate_argnums=0)
    return lambda params: ((params, tx.init(params)), jitted)


def _with_incremental_update(optimizer: optax.GradientTransformation, *, donate: bool) -> Make:
    """The step, then the average in a second jitted call."""
    update = jax.jit(
        lambda average, params: optax.incremental_update(params, average, 1 - DECAY),
        donate_argnums=(0,) if donate else (),
    )

    def make(params: Arrays) -> tuple[Any, Step]:
        state, step = _chained(optimizer, optax.identity())(params)

        def both(state: Any, grads: Arrays) -> Any:
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

    def make(params: Arrays) -> tuple[Any, Step]:
        model = nnx.List([nnx.Param(leaf) for leaf in params])
        optimizer = nnx.Optimizer(model, optax_optimizer, wrt=nnx.Param)
        average = nnx.EMA(model, decay=DECAY)
        structure = jax.tree.structure(nnx.state(model, nnx.Param))

        def step(state: Any, grads: Arrays) -> Any:
            train(*state, structure.unflatten(grads))  # type: ignore[call-arg]
            return state

        return (model, optimizer, average), step

    return make
