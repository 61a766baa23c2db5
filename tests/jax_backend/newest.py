"""The bits of a compiled step under the JAX that is installed, which may be newer than that of the tests.

JAX 0.12 needs Python 3.12. In the steps that it compiles for a CPU, small arrays of bfloat16 and float16
lose the fused multiply-add of the average unless they are updated behind a barrier. Prints the
elements that differ from an update that is compiled alone; exits with 1 where there are any. With
``--cost`` it times the step of 500 such arrays.
"""

from __future__ import annotations

import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ema.jax_backend import params_ema
from ema.jax_backend.update import sweep
from ema.jax_backend.update.equation import lerp

SHAPES = [
    *[
        (),
        (3,),
        (4,),
        (16,),
        (64,),
        (1000,),
        (4, 4),
        (4, 3),
        (3, 4),
        (1, 4),
        (4, 1),
        (8, 4),
        (16, 3),
    ],
    *[
        (7, 5),
        (8, 8),
        (15, 17),
        (32, 8),
        (128, 4),
        (2, 4, 4),
        (3, 3, 3),
        (4, 4, 4, 4),
        (2, 2, 3, 3),
    ],
]
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adamw": optax.adamw(1e-2, eps=1e-3)}
DECAY, STEPS = 0.9, 30


def differing(shape: tuple[int, ...], dtype: str, optimizer: optax.GradientTransformation) -> int:
    tx, rng = optax.chain(optimizer, params_ema(DECAY)), np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=shape), dtype)
    state, found = tx.init(params), 0

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        before = state[-1].params_ema
        params, state = step(params, state, jnp.asarray(rng.normal(size=shape), dtype))
        alone = lerp(before, params.astype(jnp.float32), jnp.float32(1 - DECAY))
        found += int((np.asarray(alone) != np.asarray(state[-1].params_ema)).sum())
    return found


def seconds(barrier: bool) -> float:
    """The median of a step of 500 arrays of (4, 4) in bfloat16."""
    sweep._SMALL = 256 if barrier else 0
    tx = optax.chain(optax.sgd(0.1), params_ema(DECAY))
    params = [jnp.ones((4, 4), jnp.bfloat16) for _ in range(500)]
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    times = []
    for _ in range(200):
        begun = time.perf_counter()
        jax.block_until_ready(step(params, state))
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main() -> int:
    print("jax", jax.__version__)
    if "--cost" in sys.argv:
        for round_ in range(3):
            print(round_, *(f"{seconds(barrier) * 1e6:.0f} µs" for barrier in (False, True)))
        return 0
    total = 0
    for dtype in ("bfloat16", "float16", "float32"):
        for name, optimizer in OPTIMIZERS.items():
            found = {shape: n for shape in SHAPES if (n := differing(shape, dtype, optimizer))}
            print(dtype, name, found or "0 differing")
            total += sum(found.values())
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
