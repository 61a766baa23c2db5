"""``params_ema``: the average as the last link of an optax chain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import DTypeLike

from ema.errors import ArgumentError
from ema.jax_backend.selection import (
    initial_average,
    is_hole,
    named_leaves,
    new_params,
    require_match,
    widen,
)
from ema.jax_backend.settings import accumulator, named_schedules, steps
from ema.jax_backend.update import lerp, update_weight
from ema.schedules import Schedule

__all__ = ["ParamsEMAState", "params_ema"]

Label = dict[str, tuple[()]] | tuple[()]


class ParamsEMAState(NamedTuple):
    """State of :func:`params_ema`.

    Attributes:
        step: calls so far; int32 scalar, stays at its largest value.
        count: updates of the average made so far; int32 scalar, likewise.
        params_ema: the average, in the structure of the params; float32 or wider, with
            ``optax.MaskedNode()`` where a leaf is not averaged. Of several averages a dict, by name.
        name: ``{"short": ()}`` for the name ``"short"``, ``()`` for none, more keys for several
            averages: a tree without leaves, so that names are static under ``jit`` and survive
            serialization.
    """

    step: jax.Array
    count: jax.Array  # type: ignore[assignment]  # optax's name for it, and tuple's for a method
    params_ema: optax.Params
    name: Label = ()

    def averages(self) -> dict[str | None, Any]:
        """Each average by its name; ``None`` is the name of one without."""
        if len(self.name) > 1:
            return dict(self.params_ema)
        return {next(iter(self.name), None): self.params_ema}


Decay = float | Schedule | jax.Array


def params_ema(
    decay: Decay | Mapping[str, Decay] = 0.999,
    *,
    update_after_step: int | jax.Array = 0,
    update_every: int | jax.Array = 1,
    accumulator_dtype: DTypeLike | None = None,
    name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keep an exponential moving average of the parameters in the optimizer's state.

    After the step that the optimizer is about to make, ``params' = params + updates``,

        average ← average + weight · (params' − average),    weight = 1 − decay,

    in the form of :func:`ema.jax_backend.update.lerp`. The updates pass through unchanged. It has
    to see the final updates, so it stands last in the chain; inside ``optax.MultiSteps`` and
    ``optax.apply_if_finite``, so that it counts the steps that are really made.

    Args:
        decay: a number in [0, 1], applied per update, or a schedule (``ema.HalfLife(steps=…)``).
            Under ``optax.inject_hyperparams`` a traced scalar of at least float32. Several averages
            from one pass over the parameters: a mapping from names to these; of one name it is the
            same as ``name``.
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
    schedules = named_schedules(decay, name)
    after = steps("update_after_step", update_after_step, minimum=0)
    every = steps("update_every", update_every, minimum=1)
    chosen = accumulator(accumulator_dtype)

    def init_fn(params: optax.Params) -> ParamsEMAState:
        return _state(
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.int32),
            {label: initial_average(params, chosen) for label in schedules},
        )

    def update_fn(
        updates: optax.Updates, state: ParamsEMAState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ParamsEMAState]:
        if params is None:
            raise ArgumentError(
                "`params` must be given to average them: tx.update(updates, opt_state, params)"
            )
        trees = state.averages()
        if trees.keys() != schedules.keys():
            raise ArgumentError(
                f"`opt_state` must hold the averages {_names(schedules)}, got {_names(trees)}"
            )
        for tree in trees.values():
            require_match(tree, params, chosen)

        step = optax.safe_increment(state.step)
        elapsed = step - after
        due = (elapsed > 0) & (elapsed % every == 0)
        count = jnp.where(due, optax.safe_increment(state.count), state.count)

        leaves = {label: named_leaves(tree)[1] for label, tree in trees.items()}
        first = next(iter(trees))
        _, _, structure = named_leaves(trees[first])
        kept = [not is_hole(leaf) for leaf in leaves[first]]
        olds = [[a for a in leaves[label] if not is_hole(a)] for label in schedules]
        news = [
            new_params(leaf, update)
            for leaf, update, keep in zip(
                structure.flatten_up_to(params), structure.flatten_up_to(updates), kept, strict=True
            )
            if keep
        ]

        def weight(schedule: Schedule, dtype: str) -> jax.Array:
            # Before the first update the count is 0, where schedules divide by it.
            scheduled = update_weight(schedule, jnp.maximum(count, 1), every, dtype)
            if isinstance(after, int) and after == 0:  # a plain decay stays a constant for XLA
                return scheduled
            return jnp.where(elapsed > 0, scheduled, jnp.ones([], dtype))

        dtypes = sorted({_real(old) for old in olds[0]})
        weights = [{d: weight(schedule, d) for d in dtypes} for schedule in schedules.values()]
        if isinstance(every, int) and every == 1:
            olds = _average(olds, news, weights)
        else:
            # The new params are operands, and not params and updates: no temporary for the sum.
            olds = lax.cond(due | (elapsed <= 0), _average, _keep, olds, news, weights)

        for label, averages in zip(schedules, olds, strict=True):
            rest = iter(averages)
            trees[label] = structure.unflatten(
                [next(rest) if keep else a for a, keep in zip(leaves[label], kept, strict=True)]
            )
        return updates, _state(step, count, trees)

    return optax.with_extra_args_support(optax.GradientTransformation(init_fn, update_fn))


def _state(step: jax.Array, count: jax.Array, trees: dict[str | None, Any]) -> ParamsEMAState:
    names = [name for name in trees if name is not None]
    return ParamsEMAState(
        step=step,
        count=count,
        params_ema=dict(trees) if len(trees) > 1 else next(iter(trees.values())),
        name=dict.fromkeys(names, ()) or (),
    )


def _names(names: Iterable[str | None]) -> str:
    return ", ".join("(unnamed)" if name is None else repr(name) for name in names)


# Functions of the module, so that an eager `lax.cond` finds its compiled branches again.
def _average(
    averages: list[list[Any]], params: list[Any], weights: list[dict[str, jax.Array]]
) -> list[list[Any]]:
    # averages of one leaf have one dtype: what is read and widened is shared by all of them
    wide = [
        widen(leaf, jnp.result_type(average))
        for average, leaf in zip(averages[0], params, strict=True)
    ]
    return [
        [lerp(a, leaf, weight[_real(a)]) for a, leaf in zip(average, wide, strict=True)]
        for average, weight in zip(averages, weights, strict=True)
    ]


def _keep(
    averages: list[list[Any]], params: list[Any], weights: list[dict[str, jax.Array]]
) -> list[list[Any]]:
    del params, weights
    return averages


def _real(average: Any) -> str:
    """Name of the dtype of the weight for an average: its own, or that of its real part."""
    return str(np.zeros((), jnp.result_type(average)).real.dtype)
