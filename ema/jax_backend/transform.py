"""``params_ema``: the average as the last link of an optax chain."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import DTypeLike

from ema import validate
from ema.errors import ArgumentError, ArgumentTypeError
from ema.jax_backend.selection import (
    initial_average,
    is_hole,
    named_leaves,
    new_params,
    require_match,
    widen,
)
from ema.jax_backend.update import lerp, update_weight
from ema.schedules import FLOAT_MATH, Namespace, Scalar, Schedule, as_schedule

__all__ = ["ParamsEMAState", "params_ema"]

Label = dict[str, tuple[()]] | tuple[()]


class ParamsEMAState(NamedTuple):
    """State of :func:`params_ema`.

    Attributes:
        step: calls so far; int32 scalar, stays at its largest value.
        count: updates of the average made so far; int32 scalar, likewise.
        params_ema: the average, in the structure of the params; float32 or wider, with
            ``optax.MaskedNode()`` where a leaf is not averaged.
        name: ``{"short": ()}`` for the name ``"short"``, ``()`` for none: a tree without leaves, so
            that the name is static under ``jit`` and survives serialization.
    """

    step: jax.Array
    count: jax.Array  # type: ignore[assignment]  # optax's name for it, and tuple's for a method
    params_ema: optax.Params
    name: Label = ()


def params_ema(
    decay: float | Schedule | jax.Array = 0.999,
    *,
    update_after_step: int | jax.Array = 0,
    update_every: int | jax.Array = 1,
    accumulator_dtype: DTypeLike | None = None,
    name: str | None = None,
) -> optax.GradientTransformation:
    """Keep an exponential moving average of the parameters in the optimizer's state.

    After the step that the optimizer is about to make, ``params' = params + updates``,

        average ← average + weight · (params' − average),    weight = 1 − decay,

    in the form of :func:`ema.jax_backend.update.lerp`. The updates pass through unchanged. It has
    to see the final updates, so it stands last in the chain; inside ``optax.MultiSteps`` and
    ``optax.apply_if_finite``, so that it counts the steps that are really made.

    Args:
        decay: a number in [0, 1], applied per update, or a schedule (``ema.HalfLife(steps=…)``).
            Under ``optax.inject_hyperparams`` a traced scalar of at least float32.
        update_after_step: through this step the average equals the live parameters; updates count
            from there. The first update of a plain decay mixes in the initial parameters unless
            this is at least 1.
        update_every: steps from one update to the next; between them nothing is computed.
        accumulator_dtype: dtype of the average, float32 or float64; by default that of the
            parameter, at least float32. Complex parameters take the complex one of that width.
        name: tells several averages in one optimizer state apart, see
            :func:`~ema.jax_backend.get_params_ema`.

    Returns:
        A transformation with :class:`ParamsEMAState`: one more array of the shape of each
        floating-point parameter. ``update`` needs the params.

    Raises:
        ArgumentError: an argument is out of its range, ``decay`` is an array narrower than float32,
            or ``update`` got no params.
        ArgumentTypeError: an argument has the wrong type.
        ModelError: from ``init``, when no leaf can be averaged; from ``update``, when the params
            are not those of the state.

    Source: Polyak and Juditsky 1992; Ruppert 1988.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> tx = optax.chain(optax.sgd(0.1), params_ema(decay=0.5))
        >>> params = jnp.array([1.0, 2.0])
        >>> opt_state = tx.init(params)
        >>> @jax.jit
        ... def step(params, opt_state):
        ...     grads = jax.grad(lambda p: jnp.sum(p**2))(params)
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     return optax.apply_updates(params, updates), opt_state
        >>> for _ in range(2):
        ...     params, opt_state = step(params, opt_state)
        >>> params
        Array([0.64, 1.28], dtype=float32)
        >>> opt_state[-1].params_ema  # 1 → 0.9 → 0.77 on the way 1 → 0.8 → 0.64
        Array([0.77, 1.54], dtype=float32)
    """
    schedule = _schedule(decay)
    after = _steps("update_after_step", update_after_step, minimum=0)
    every = _steps("update_every", update_every, minimum=1)
    chosen = _accumulator(accumulator_dtype)
    label = _label(name)

    def init_fn(params: optax.Params) -> ParamsEMAState:
        return ParamsEMAState(
            step=jnp.zeros([], jnp.int32),
            count=jnp.zeros([], jnp.int32),
            params_ema=initial_average(params, chosen),
            name=label,
        )

    def update_fn(
        updates: optax.Updates, state: ParamsEMAState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ParamsEMAState]:
        if params is None:
            raise ArgumentError(
                "`params` must be given to average them: tx.update(updates, opt_state, params)"
            )
        require_match(state.params_ema, params, chosen)

        step = optax.safe_increment(state.step)
        elapsed = step - after
        due = (elapsed > 0) & (elapsed % every == 0)
        count = jnp.where(due, optax.safe_increment(state.count), state.count)

        _, averages, structure = named_leaves(state.params_ema)
        kept = [not is_hole(average) for average in averages]
        olds = [a for a, keep in zip(averages, kept, strict=True) if keep]
        news = [
            new_params(leaf, update)
            for leaf, update, keep in zip(
                structure.flatten_up_to(params), structure.flatten_up_to(updates), kept, strict=True
            )
            if keep
        ]

        def weight(dtype: DTypeLike) -> jax.Array:
            # Before the first update the count is 0, where schedules divide by it.
            scheduled = update_weight(schedule, jnp.maximum(count, 1), every, dtype)
            return jnp.where(elapsed > 0, scheduled, jnp.ones([], dtype))

        weights = {dtype: weight(dtype) for dtype in sorted({_real(old) for old in olds})}
        if isinstance(every, int) and every == 1:
            olds = _average(olds, news, weights)
        else:
            # The new params are operands, and not params and updates: no temporary for the sum.
            olds = lax.cond(due | (elapsed <= 0), _average, _keep, olds, news, weights)

        rest = iter(olds)
        averages = [next(rest) if keep else a for a, keep in zip(averages, kept, strict=True)]
        return updates, state._replace(
            step=step, count=count, params_ema=structure.unflatten(averages)
        )

    return optax.GradientTransformation(init_fn, update_fn)


# Functions of the module, so that an eager `lax.cond` finds its compiled branches again.
def _average(
    averages: list[Any], params: list[Any], weights: dict[str, jax.Array]
) -> list[jax.Array]:
    return [
        lerp(average, widen(leaf, jnp.result_type(average)), weights[_real(average)])
        for average, leaf in zip(averages, params, strict=True)
    ]


def _keep(averages: list[Any], params: list[Any], weights: dict[str, jax.Array]) -> list[Any]:
    del params, weights
    return averages


def _real(average: Any) -> str:
    """Name of the dtype of the weight for an average: its own, or that of its real part."""
    return str(np.zeros((), jnp.result_type(average)).real.dtype)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class _TracedDecay(Schedule):
    """A plain decay whose value is known only when the step runs."""

    decay: jax.Array

    def weight(self, count: Scalar, span: Scalar = 1, xp: Namespace = FLOAT_MATH) -> Scalar:
        del count, span, xp
        return 1.0 - self.decay.astype(jnp.float64)


def _schedule(decay: object) -> Schedule:
    if not isinstance(decay, jax.Array | np.ndarray | np.generic):
        return as_schedule(decay)
    _require_scalar("decay", decay)
    dtype = decay.dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ArgumentTypeError(f"`decay` must be a real number, got an array of {dtype}")
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise ArgumentError(
            f"`decay` must be at least float32, got {dtype}, in which 0.9999 is"
            f" {float(np.asarray(0.9999, dtype))}: optax.inject_hyperparams takes the dtype of the"
            " params for it unless told hyperparam_dtype=jnp.float32"
        )
    if isinstance(decay, jax.core.Tracer):
        return _TracedDecay(decay=decay)
    return as_schedule(decay.item())


def _steps(name: str, value: Any, *, minimum: int) -> int | jax.Array:
    """A static number of steps, or a traced one, whose value nobody can check yet."""
    if not isinstance(value, jax.Array | np.ndarray):
        return validate.integer(name, value, minimum)
    _require_scalar(name, value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ArgumentTypeError(f"`{name}` must be an integer, got an array of {value.dtype}")
    if isinstance(value, jax.core.Tracer):
        return value.astype(jnp.int32)
    return validate.integer(name, value.item(), minimum)


def _require_scalar(name: str, value: Any) -> None:
    if value.ndim != 0:
        raise ArgumentTypeError(f"`{name}` must be a scalar, got an array of shape {value.shape}")


def _accumulator(dtype: Any) -> np.dtype[Any] | None:
    if dtype is None:
        return None
    if isinstance(dtype, jax.Array):
        raise ArgumentTypeError(
            "`accumulator_dtype` must be a dtype, got an array: optax.inject_hyperparams calls"
            ' jnp.float32 as if it were a schedule unless told static_args="accumulator_dtype"'
        )
    try:
        chosen: np.dtype[Any] = jnp.dtype(dtype)
    except TypeError:
        raise ArgumentTypeError(f"`accumulator_dtype` must be a dtype, got {dtype!r}") from None
    if chosen not in (np.float32, np.float64):
        raise ArgumentError(
            f"`accumulator_dtype` must be float32 or float64, got {chosen}: a narrower average"
            " rounds the small corrections away (a bfloat16 average at decay 0.999 does not move)"
        )
    return chosen


def _label(name: object) -> Label:
    if name is None:
        return ()
    if not isinstance(name, str):
        raise ArgumentTypeError(f"`name` must be a string, got {name!r} ({type(name).__name__})")
    if not name:
        raise ArgumentError("`name` must not be empty, got ''")
    return {name: ()}
