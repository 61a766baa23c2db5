"""Both backends round the same weight of every update to float32."""

import numpy as np
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("span", [1, 3])
def test_the_weights_agree_for_all_counts_to_a_million(schedule, span):
    """Python floats against a traced scalar count, for counts 1 to 1 000 000."""
    import jax
    import jax.numpy as jnp

    from ema.jax_backend.update.equation import update_weight

    ((_, scheduled),) = schedule.items()
    counts = np.arange(1, 1_000_001, dtype=np.int32)
    traced = jax.jit(
        lambda c: jax.lax.map(lambda n: update_weight(scheduled, n, span, jnp.float32), c)
    )(counts)
    python = [scheduled.weight(float(n), span) for n in counts.tolist()]
    assert (np.asarray(traced) != np.array(python, np.float32)).sum() == 0
