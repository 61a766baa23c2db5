"""The JAX backend: an average of the parameters as one link of an optax chain.

>>> import jax.numpy as jnp
>>> import optax
>>> from ema.jax_backend import get_params_ema, params_ema
>>> tx = optax.chain(optax.sgd(0.5), params_ema(decay=0.9))
>>> params = {"w": jnp.ones(2)}
>>> opt_state = tx.init(params)
>>> updates, opt_state = tx.update({"w": jnp.ones(2)}, opt_state, params)
>>> params = optax.apply_updates(params, updates)
>>> get_params_ema(opt_state, params)  # 0.9 * 1.0 + 0.1 * 0.5
{'w': Array([0.95, 0.95], dtype=float32)}
"""

from __future__ import annotations

from ema.extras import require

require("jax", "jax")
require("optax", "jax")

# After the two lines above, so that the error for a missing package names the extra to install.
from ema.jax_backend.access import get_params_ema
from ema.jax_backend.saving.files import load_params_ema, save_params_ema
from ema.jax_backend.saving.restore import adapt_opt_state
from ema.jax_backend.state import ParamsEMAState
from ema.jax_backend.transform import params_ema

__all__ = [
    "ParamsEMAState",
    "adapt_opt_state",
    "get_params_ema",
    "load_params_ema",
    "params_ema",
    "save_params_ema",
]
