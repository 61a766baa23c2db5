"""``params_ema``: the average as the last link of an optax chain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import DTypeLike

from ema.errors import ArgumentError
from ema.jax_backend.selection import (
    initial_average,
    initial_remainder,
    new_params,
    require_match,
)
from ema.jax_backend.settings import NARROW, Settings
from ema.jax_backend.state import ParamsEMAState, as_field, flats_of
from ema.jax_backend.trees import Flat, without_hooks
from ema.jax_backend.update.equation import update_weight
from ema.jax_backend.update.guard import raise_where_not_finite
from ema.jax_backend.update.rounding import key_of
from ema.jax_backend.update.sweep import Kept, keep, real_dtype, sweep
from ema.options import OnNonfinite, Precision
from ema.rounding import stream_of
from ema.schedules import Schedule

__all__ = ["params_ema", "transform_of"]

Decay = float | Schedule | jax.Array


def params_ema(
    decay: Decay | Mapping[str, Decay] = 0.999,
    *,
    update_after_step: int | jax.Array = 0,
    update_every: int | jax.Array = 1,
    accumulator_dtype: DTypeLike | None = None,
    name: str | None = None,
    compensated: bool = False,
    stochastic_rounding: bool = True,
    seed: int = 0,
    on_nonfinite: OnNonfinite = "propagate",
) -> optax.GradientTransformationExtraArgs:
    """Keep an exponential moving average of the parameters in the optimizer's state.

    After the step that the optimizer is about to make, ``params' = params + updates``,

        average ← average + weight · (params' − average),    weight = 1 − decay,

    in the form of :func:`ema.jax_backend.update.equation.lerp`. The updates pass through unchanged.
    Without updates, ``update(None, state, params)`` averages the params as they are.

    The transformation must see the final updates, so put it last in the chain. Put it inside
    ``optax.MultiSteps`` and ``optax.apply_if_finite``, so that it counts only the steps that they
    make.

    Args:
        decay: the decay of one update in [0, 1], or a schedule (``ema.HalfLife(steps=…)``). ``jit``
            traces a schedule of your own, so its ``weight`` must be an expression of ``xp``. Under
            ``optax.inject_hyperparams`` it is a traced scalar of at least float32. A mapping from
            names to decays keeps several averages, which read the parameters once; a mapping with
            one name is the same as ``name``.
        update_after_step: through this step the average equals the live parameters; updates count
            from there. If it is 0, the first update of a plain decay mixes in the initial
            parameters.
        update_every: steps from one update to the next; the steps between compute nothing.
        accumulator_dtype: dtype of the average: float32, float64 or bfloat16. By default it is the
            dtype of the parameter, at least float32. Complex parameters have complex averages of
            that width, at least complex64.
        name: name of the average, if one optimizer state holds several averages, see
            :func:`~ema.jax_backend.get_params_ema`.
        compensated: keep the rounding error of each update in a remainder beside the average, in
            the same dtype (:func:`ema.jax_backend.update.equation.lerp_compensated`). Then the
            average moves at any decay.
        stochastic_rounding: round a bfloat16 average up or down at random, so that small updates
            add up (:func:`ema.jax_backend.update.equation.lerp_narrow`). The random bits of an
            element depend on ``seed``, the number of the update, the name of the leaf and the
            place of the element in it, not on the devices.
        seed: seed of the stochastic rounding, in [0, 2**64).
        on_nonfinite: what an update does if it is due and an averaged parameter holds NaN or Inf.
            ``"propagate"`` averages them. ``"skip"`` leaves the averages and ``count`` unchanged
            and adds 1 to ``skipped`` of the state; the device decides. ``"raise"`` raises an
            error, in loops that call ``update`` eagerly; ``jit`` and ``lax.scan`` cannot raise, so
            they refuse it.

    Returns:
        A transformation with the state :class:`ParamsEMAState`. The state holds one more array of
        the shape of each floating-point parameter, or two if compensated. ``update`` needs the
        params.

    Raises:
        ArgumentError: an argument is out of its range, or ``decay`` is an array narrower than
            float32. From ``update``: it got no params; it got a state that was made with other
            options; it is traced and ``on_nonfinite`` is ``"raise"``; or a schedule of your own
            cannot be traced, or gives a weight that JAX knows before the step runs and that is
            outside [0, 1].
        ArgumentTypeError: an argument has the wrong type.
        ModelError: from ``init``, when no leaf can be averaged; from ``update``, when the params
            do not match the state.
        StateError: from ``update``, if a parameter holds NaN or Inf and ``on_nonfinite`` is
            ``"raise"``, or if a bfloat16 average is updated inside ``jax.shard_map``.

    Warns:
        EMAWarning: a bfloat16 average is rounded to nearest and will not move.

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
    return transform_of(
        Settings(
            decay=decay,
            update_after_step=update_after_step,
            update_every=update_every,
            accumulator_dtype=accumulator_dtype,
            name=name,
            compensated=compensated,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            on_nonfinite=on_nonfinite,
        )
    )


def transform_of(settings: Settings) -> optax.GradientTransformationExtraArgs:
    """:func:`params_ema` with options that are already validated."""
    schedules, precision = settings.schedules, settings.precision
    after, every = settings.update_after_step, settings.update_every
    chosen: np.dtype[Any] | None = settings.accumulator_dtype

    def init_fn(params: optax.Params) -> ParamsEMAState:
        held = without_hooks(params)
        trees = {label: initial_average(held, chosen) for label in schedules}
        remainders = {label: initial_remainder(tree) for label, tree in trees.items()}
        return ParamsEMAState(
            step=jnp.zeros([], jnp.int32),
            count=jnp.zeros([], jnp.int32),
            params_ema=as_field(trees),
            name=dict.fromkeys((label for label in schedules if label is not None), ()) or (),
            remainder=as_field(remainders) if precision.compensated else (),
            skipped=jnp.zeros([], jnp.int32) if precision.on_nonfinite == "skip" else (),
        )

    def update_fn(
        updates: optax.Updates, state: ParamsEMAState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ParamsEMAState]:
        if params is None:
            raise ArgumentError(
                "`params` must be given to average them: tx.update(updates, opt_state, params), or"
                " tx.update(None, opt_state, params) for an average without an optimizer"
            )
        averages, remainders = flats_of(state, schedules, precision)
        live = Flat.of(params)
        for average in averages.values():
            require_match(average, live, chosen)
        first = next(iter(averages.values()))
        news = _after_step(first, live, updates)

        step = _next(state.step, every)
        elapsed = step - after
        due = (elapsed > 0) & (elapsed % every == 0)
        number = jnp.where(due, optax.safe_increment(state.count), state.count)
        if precision.on_nonfinite == "raise":
            raise_where_not_finite(due, first.pick(first.names), news)

        kept = _kept(averages, remainders)
        weights = _weights(settings, number, elapsed, kept.averages[0])
        keys = _keys(precision, first, number)
        anyway = elapsed <= 0 if precision.on_nonfinite == "skip" else None
        if isinstance(every, int) and every == 1:
            kept, made = sweep(kept, news, weights, keys, anyway)
        else:
            # Pass the new params, not params and updates: then XLA needs no temporary for the sum.
            kept, made = lax.cond(
                due | (elapsed <= 0), sweep, keep, kept, news, weights, keys, anyway
            )
        after_update = state._replace(
            step=step, count=number, params_ema=_filled(averages, kept.averages)
        )
        if precision.compensated:
            after_update = after_update._replace(remainder=_filled(remainders, kept.remainders))
        if made is not None:
            after_update = after_update._replace(
                count=jnp.where(made, number, state.count),
                skipped=jnp.where(made, state.skipped, optax.safe_increment(state.skipped)),
            )
        return updates, after_update

    return optax.with_extra_args_support(optax.GradientTransformation(init_fn, update_fn))


def _after_step(average: Flat, live: Flat, updates: optax.Updates) -> list[Any]:
    """The averaged params as they are after the optimizer's step."""
    params = average.pick(live.leaves)
    if updates is None:
        return [new_params(leaf, None) for leaf in params]
    changes = average.pick(average.structure.flatten_up_to(updates))
    return [new_params(leaf, change) for leaf, change in zip(params, changes, strict=True)]


def _kept(averages: dict[str | None, Flat], remainders: dict[str | None, Flat]) -> Kept:
    several = [average.pick() for average in averages.values()]
    if remainders:
        return Kept(several, [remainder.pick() for remainder in remainders.values()])
    return Kept(several, [[None] * len(leaves) for leaves in several])


def _filled(flats: dict[str | None, Flat], values: list[list[Any]]) -> Any:
    """A field of the state with these values."""
    return as_field(
        {label: flat.fill(new) for (label, flat), new in zip(flats.items(), values, strict=True)}
    )


def _weights(
    settings: Settings, number: jax.Array, elapsed: jax.Array, leaves: list[Any]
) -> list[dict[str, jax.Array]]:
    """The weight of each average in this update, by the dtype of the arithmetic."""
    after, every = settings.update_after_step, settings.update_every

    def weight(schedule: Schedule, dtype: str) -> jax.Array:
        # Before the first update the count is 0, and schedules divide by it.
        scheduled = update_weight(schedule, jnp.maximum(number, 1), every, dtype)
        if isinstance(after, int) and after == 0:  # a plain decay stays a constant for XLA
            return scheduled
        return jnp.where(elapsed > 0, scheduled, jnp.ones([], dtype))

    dtypes = sorted({real_dtype(leaf) for leaf in leaves})
    return [{d: weight(schedule, d) for d in dtypes} for schedule in settings.schedules.values()]


def _next(step: jax.Array, every: int | jax.Array) -> jax.Array:
    """The next step; at the end of int32 it goes back by ``every``, so updates stay on schedule."""
    last = np.iinfo(np.int32).max
    before = jnp.where(step == last, jnp.asarray(last - every, jnp.int32), step)
    after: jax.Array = before + jnp.int32(1)
    return after


def _keys(precision: Precision, average: Flat, number: jax.Array) -> list[jax.Array | None]:
    """The key of stochastic rounding for each averaged leaf; None for other rounding."""
    return [
        key_of(stream_of(name, precision.seed), number)
        if precision.stochastic_rounding and jnp.result_type(leaf) == NARROW
        else None
        for name, leaf in zip(average.pick(average.names), average.pick(), strict=True)
    ]
