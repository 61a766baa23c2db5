"""A thousand JAX steps in one ``lax.scan``, with and without an average of the parameters."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.measure import Case, Contender
from benchmarks.setting import DECAY, Setting
from ema.jax_backend import params_ema

__all__ = ["build", "build_small"]

LEAVES = {"full": 12, "quick": 12, "tiny": 2}
LENGTHS = {"full": 1_000, "quick": 100, "tiny": 20}


def build(setting: Setting) -> Case:
    return _build((512, 512), setting)


def build_small(setting: Setting) -> Case:
    return _build((256, 256), setting)


def _build(shape: tuple[int, int], setting: Setting) -> Case:
    shape = (16, 16) if setting.size == "tiny" else shape
    length, leaves = LENGTHS[setting.size], LEAVES[setting.size]
    keys = jax.random.split(jax.random.key(0), leaves)
    grads = [1e-3 * jax.random.normal(key, shape) for key in keys]
    links = {
        "update_every=1": params_ema(DECAY),
        "update_every=10": params_ema(DECAY, update_every=10),
        "no average": optax.identity(),
    }
    return Case(
        title=f"{length} steps of sgd in one lax.scan:"
        f" {leaves * shape[0] * shape[1] / 1e6:.2g} M float32 in {leaves} leaves",
        contenders=[_contender(name, link, grads, length) for name, link in links.items()],
        references=["no average"],
        baseline="no average",
        unit="update_every=1",
        note="Bar: update_every=10 adds at most 0.3 of what update_every=1 adds.",
    )


def _contender(
    name: str, link: optax.GradientTransformation, grads: list[jax.Array], length: int
) -> Contender:
    tx = optax.chain(optax.sgd(1e-3), link)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state: Any, grads: list[jax.Array]) -> Any:
        def step(state: Any, _: None) -> tuple[Any, None]:
            params, opt_state = state
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, state, length=length)[0]

    params = [jnp.copy(leaf) for leaf in grads]
    state = (params, tx.init(params))

    def call() -> None:
        nonlocal state
        state = run(state, grads)

    return Contender(
        name=name,
        call=call,
        kind="limit" if name == "no average" else "ours",
        finish=lambda: jax.block_until_ready(state),
    )
