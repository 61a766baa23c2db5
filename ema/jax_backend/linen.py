"""``EMATrainState``: linen's ``TrainState`` with properties that read the average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from ema.errors import ArgumentError
from ema.extras import require
from ema.jax_backend.access import get_params_ema
from ema.jax_backend.state import ParamsEMAState

require("flax", "jax")

from flax import struct  # after the line that says how to install it
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training.train_state import TrainState

__all__ = ["EMATrainState"]


class EMATrainState(TrainState):
    """A ``TrainState`` whose chain ends with ``params_ema``.

    ``batch_stats`` may hold the statistics of BatchNorm layers. ``ema_variables`` contains the live
    statistics unless ``batch_stats_tx`` averages them too.

    Attributes:
        batch_stats: the collection of that name; ``None`` if the model has none.
        batch_stats_ema: state of the statistics' average; ``None`` if they are not averaged.
        batch_stats_tx: ``params_ema(...)`` that averages the statistics. It counts every call of
            ``apply_gradients``, even if ``optax.MultiSteps`` makes one step of several calls.
        ema_name: which average, if the chain has several; likewise for the statistics.

    Example:
        >>> import flax.linen as nn
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from ema.jax_backend import params_ema
        >>> model, x = nn.Dense(2), jnp.ones((1, 3))
        >>> state = EMATrainState.create(
        ...     apply_fn=model.apply,
        ...     params=model.init(jax.random.key(0), x)["params"],
        ...     tx=optax.chain(optax.sgd(0.1), params_ema(0.99)),
        ... )
        >>> grads = jax.grad(lambda p: state.apply_fn({"params": p}, x).sum())(state.params)
        >>> state = state.apply_gradients(grads=grads)
        >>> state.apply_fn(state.ema_variables, x).shape  # with the averaged weights
        (1, 2)
    """

    batch_stats: Any = None
    batch_stats_ema: ParamsEMAState | None = None
    batch_stats_tx: optax.GradientTransformation | None = struct.field(  # type: ignore[no-untyped-call]
        pytree_node=False, default=None
    )
    ema_name: str | None = struct.field(  # type: ignore[no-untyped-call]
        pytree_node=False, default=None
    )

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: Any,
        tx: optax.GradientTransformation,
        batch_stats: Any = None,
        batch_stats_tx: optax.GradientTransformation | None = None,
        **kwargs: Any,  # the fields of a subclass, as in TrainState
    ) -> EMATrainState:
        """A state at step 0.

        Raises:
            ArgumentError: ``batch_stats_tx`` has no ``batch_stats`` to average.
        """
        if batch_stats_tx is not None and batch_stats is None:
            raise ArgumentError("`batch_stats` must be given for `batch_stats_tx` to average")
        state: EMATrainState = super().create(  # type: ignore[no-untyped-call]
            apply_fn=apply_fn,
            params=params,
            tx=tx,
            batch_stats=batch_stats,
            batch_stats_tx=batch_stats_tx,
            batch_stats_ema=None if batch_stats_tx is None else batch_stats_tx.init(batch_stats),
            **kwargs,
        )
        return state

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> EMATrainState:
        """Make one optimizer step; ``batch_stats=`` takes the statistics of the same step."""
        state: EMATrainState = super().apply_gradients(  # type: ignore[no-untyped-call]
            grads=grads, **kwargs
        )
        if state.batch_stats_tx is None:
            return state
        # without updates the statistics are averaged as they are
        unchanged = jax.tree.map(lambda _: None, state.batch_stats)
        _, average = state.batch_stats_tx.update(
            unchanged, state.batch_stats_ema, state.batch_stats
        )
        return state.replace(batch_stats_ema=average)

    @property
    def ema_params(self) -> Any:
        """The averaged params, cast and filled like ``params``; see ``get_params_ema``."""
        params: Any = self.params
        if isinstance(params, Mapping) and OVERWRITE_WITH_GRADIENT in params:
            # the optimizer does not treat the scales of fp8 as parameters
            average = get_params_ema(self.opt_state, params["params"], self.ema_name)
            return {**params, "params": average}
        return get_params_ema(self.opt_state, params, self.ema_name)

    @property
    def ema_batch_stats(self) -> Any:
        """The averaged statistics if they are averaged, otherwise the live ones."""
        if self.batch_stats_ema is None:
            return self.batch_stats
        name = self.ema_name if len(self.batch_stats_ema.averages()) > 1 else None
        return get_params_ema(self.batch_stats_ema, self.batch_stats, name)

    @property
    def ema_variables(self) -> dict[str, Any]:
        """The variables to pass to ``apply_fn`` to run the model with the averages."""
        if self.batch_stats is None:
            return {"params": self.ema_params}
        return {"params": self.ema_params, "batch_stats": self.ema_batch_stats}
