"""Averages of ``flax.nnx`` modules: an object beside the model, and a swap.

Two ways lead to the same numbers: ``EMA``, if the loop calls ``update`` itself, or ``params_ema``
in the chain of an ``nnx.Optimizer``. :func:`use_ema` puts the average of either into the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast, final

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from ema.errors import ArgumentError, ArgumentTypeError, ModelError, StateError, difference
from ema.extras import require
from ema.jax_backend.access import get_params_ema
from ema.jax_backend.selection import is_inexact, require_match
from ema.jax_backend.settings import Settings
from ema.jax_backend.state import ParamsEMAState, flats_of
from ema.jax_backend.static import StaticSettings
from ema.jax_backend.transform import transform_of
from ema.jax_backend.trees import Flat, is_hole
from ema.options import OnNonfinite, Precision
from ema.schedules import Schedule

require("flax", "jax")

from flax import nnx  # after the line that says how to install it

__all__ = ["EMA", "EMAVariable", "use_ema"]

M = TypeVar("M")
Path = tuple[Any, ...]
_NUMBERS = (float, complex)


class EMAVariable(nnx.Variable[Any]):
    """A value of an average that no model uses: a counter, a remainder or an unrounded average."""


@final
class EMA(nnx.Pytree):
    """Exponential moving average of the Variables of a model, in place of ``nnx.EMA``.

    Every :meth:`update` moves the average towards the model by the weight ``w`` of the schedule
    (``1 − decay``). The arithmetic is always float32 or wider::

        average + w · (params − average)                 w < 0.5
        params  − (params − average) · (1 − w)           otherwise

    Only floating-point Variables are averaged, even if ``only`` selects integers or PRNG keys. An
    ``EMA`` is a pytree: ``nnx.jit`` (also donated), ``nnx.scan`` and checkpoints take it.

    Args:
        model: any module, or its ``nnx.State``; its values are copied, and it is not kept.
        decay: the decay of one update in [0, 1], or a schedule.
        only: filter of the Variables to average; ``(nnx.Param, nnx.BatchStat)`` averages the
            statistics of BatchNorm layers too.
        update_after_step: through this step the average equals the model; updates count from there.
        update_every: steps from one update to the next.
        accumulator_dtype: float32, float64 or bfloat16; by default the dtype of the Variable, at
            least float32.
        compensated: keep the rounding error of each update in a remainder beside the average.
        stochastic_rounding: round a bfloat16 average up or down at random.
        seed: seed of the stochastic rounding.
        on_nonfinite: if a Variable holds NaN or Inf: ``"propagate"``, ``"skip"`` or ``"raise"``
            (in eager calls only). See :func:`~ema.jax_backend.params_ema` for details.
        graph: graph mode or tree mode, as everywhere in nnx.

    Attributes:
        params: ``nnx.State`` of the averages. Its Variables have the types, dtypes and metadata of
            the model's, and :meth:`apply_to` puts these same objects into a model. If a Variable is
            narrower than its average, it holds a rounded copy, two more bytes an element.
        step: calls of :meth:`update` so far.
        count: updates made so far.
        skipped: with ``on_nonfinite="skip"``, updates that were due but skipped; else None.

    Raises:
        ArgumentError: an argument is out of range.
        ArgumentTypeError: an argument has the wrong type.
        ModelError: nothing in the model can be averaged, or a Variable holds no array.

    Sources: the interface follows ``flax.nnx.EMA``; the average is from Polyak and Juditsky 1992.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from flax import nnx
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        >>> ema = EMA(model, decay=0.9)
        >>> ema_model = ema.apply_to(model)
        >>> @nnx.jit
        ... def train_step(model, optimizer, ema, x):
        ...     grads = nnx.grad(lambda m: jnp.mean(m(x) ** 2))(model)
        ...     optimizer.update(model, grads)
        ...     ema.update(model)
        >>> train_step(model, optimizer, ema, jnp.ones((4, 2)))
        >>> ema_model.kernel is ema.params.kernel  # it follows every update
        True
    """

    def __init__(
        self,
        model: Any,
        decay: float | Schedule = 0.999,
        *,
        only: Any = nnx.Param,
        update_after_step: int = 0,
        update_every: int = 1,
        accumulator_dtype: DTypeLike | None = None,
        compensated: bool = False,
        stochastic_rounding: bool = True,
        seed: int = 0,
        on_nonfinite: OnNonfinite = "propagate",
        graph: bool | None = None,
    ) -> None:
        self.only = only
        self.graph = graph
        self._static = StaticSettings(
            Settings(
                decay=_one(decay),
                update_after_step=update_after_step,
                update_every=update_every,
                accumulator_dtype=accumulator_dtype,
                name=None,
                compensated=compensated,
                stochastic_rounding=stochastic_rounding,
                seed=seed,
                on_nonfinite=on_nonfinite,
            )
        )
        live = _selected(self, model)
        if not live:
            raise ModelError(
                f"`model` must hold a floating-point Variable to average, got none that"
                f" only={only!r} lets through"
            )
        state = self._transform().init(nnx.as_pure(live))
        self.step = EMAVariable(state.step)
        self.count = EMAVariable(state.count)
        shown, finer = {}, {}
        averages = dict(nnx.to_flat_state(state.params_ema))
        for path, variable in nnx.to_flat_state(live):
            average = averages[path]
            # a layer writes into its statistics whenever it is called in training mode
            if average.dtype != jnp.result_type(_value(variable)) or not isinstance(
                variable, nnx.Param
            ):
                finer[path] = _beside(variable, average)
                average = jnp.array(_value(variable), copy=True)
            shown[path] = variable.copy(average)
        self.params = nnx.data(nnx.from_flat_state(shown))
        self.finer = nnx.data(nnx.from_flat_state(finer))
        remainder = {}
        if self.precision.compensated:
            lost = dict(nnx.to_flat_state(state.remainder))
            remainder = {
                path: _beside(variable, lost[path]) for path, variable in nnx.to_flat_state(live)
            }
        self.remainder = nnx.data(nnx.from_flat_state(remainder))
        self.skipped = nnx.data(
            EMAVariable(state.skipped) if self.precision.on_nonfinite == "skip" else None
        )

    @property
    def decay(self) -> Schedule:
        """The schedule of the decay; a plain number is a ``ConstantDecay``."""
        return self._settings.schedules[None]

    @decay.setter
    def decay(self, decay: float | Schedule) -> None:
        self._static = StaticSettings(self._settings.with_decay(_one(decay)))

    @property
    def precision(self) -> Precision:
        """The precision options."""
        return self._settings.precision

    @property
    def _settings(self) -> Settings:
        return self._static.settings

    def update(self, model: Any) -> None:
        """Count a step and, if one is due, make an update: call it after ``optimizer.update``.

        Args:
            model: the model, or its ``nnx.State``; not changed.

        Raises:
            ModelError: its Variables do not match the average; nothing has changed.
        """
        live = nnx.as_pure(_selected(self, model))
        unchanged = jax.tree.map(lambda _: None, live)
        _, after = self._transform().update(unchanged, self.state(), live)
        self._take(after)

    def state(self) -> ParamsEMAState:
        """The average as a state of ``params_ema``.

        :func:`~ema.jax_backend.save_params_ema` and :func:`~ema.jax_backend.load_params_ema` take
        it. It shares its arrays with the average, without a copy.
        """
        state = ParamsEMAState(self.step[...], self.count[...], self.averaged_parameters())
        if self.precision.compensated:
            state = state._replace(remainder=nnx.as_pure(self.remainder))
        if self.skipped is not None:
            state = state._replace(skipped=self.skipped[...])
        return state

    def set_state(self, state: ParamsEMAState) -> None:
        """Continue from a state, such as ``load_params_ema(path, average.state())``.

        Raises:
            ArgumentError: the state was made with other options; nothing has changed.
            ModelError: the state belongs to other Variables; nothing has changed.
        """
        averages, _ = flats_of(state, self._settings.schedules, self.precision)
        ours = Flat.of(self.averaged_parameters())
        require_match(averages[None], ours, self._settings.accumulator_dtype)
        self._take(state)

    def _take(self, state: ParamsEMAState) -> None:
        self.step[...], self.count[...] = state.step, state.count
        if self.skipped is not None:
            self.skipped[...] = state.skipped
        finer = dict(nnx.to_flat_state(self.finer))
        shown = dict(nnx.to_flat_state(self.params))
        remainder = dict(nnx.to_flat_state(self.remainder))
        for path, average in nnx.to_flat_state(state.params_ema):
            if path in finer:
                _put(finer[path], average)
            copied = jnp.array(average, copy=True) if path in finer else average
            _put(shown[path], copied.astype(_value(shown[path]).dtype))
        for path, lost in nnx.to_flat_state(state.remainder) if remainder else ():
            _put(remainder[path], lost)

    def apply_to(self, model: M) -> M:
        """A model like ``model`` with the averages in place of its Variables.

        The result holds the Variables of ``params`` themselves, so it follows every later update.
        It shares with ``model`` all Variables that are not averaged. For example, a call of either
        model in training mode changes the BatchNorm statistics of both.

        Raises:
            ModelError: the Variables of ``model`` do not match the average.
        """
        theirs = dict(nnx.to_flat_state(_selected(self, model)))
        ours = dict(nnx.to_flat_state(self.params))
        if text := difference(
            [_name(path) for path in ours if path not in theirs],
            [_name(path) for path in theirs if path not in ours],
            [
                f"`{_name(path)}` has shape {shape}, its average has {_value(ours[path]).shape}"
                for path in ours
                if path in theirs
                and (shape := jnp.shape(_value(theirs[path]))) != _value(ours[path]).shape
            ],
        ):
            raise ModelError(f"`model` does not match the average: {text}")
        graphdef, state = nnx.split(model, graph=self.graph)
        result: M = nnx.merge(graphdef, nnx.merge_state(state, self.params))
        return result

    def averaged_parameters(self) -> Any:
        """The averages as plain arrays of full precision, in the structure of ``nnx.state``."""
        finer = dict(nnx.to_flat_state(self.finer))
        return nnx.from_flat_state(
            {
                path: _value(finer.get(path, variable))
                for path, variable in nnx.to_flat_state(self.params)
            }
        )

    def _transform(self) -> optax.GradientTransformation:
        return transform_of(self._settings)


@contextmanager
def use_ema(model: M, source: nnx.Optimizer[Any] | EMA, name: str | None = None) -> Iterator[M]:
    """Put averaged weights into ``model`` for the block; afterwards, always put back the live ones.

    If dtypes agree, nothing is copied: until the block ends, the model holds the arrays of the
    average. So do not donate the model to a function inside the block. Changes that the block makes
    to these weights are lost.

    Args:
        model: the model whose weights are averaged.
        source: an ``nnx.Optimizer`` with ``params_ema`` in its chain, or an :class:`EMA`.
        name: which average, if the chain has several.

    Yields:
        The model.

    Raises:
        ArgumentError: there is no such average, or there are several.
        ArgumentTypeError: ``source`` is of another type.
        ModelError: the average does not match this model; nothing has changed.
        StateError: at the end of the block, if the block has donated the average.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax
        >>> from flax import nnx
        >>> from ema.jax_backend import params_ema
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> tx = optax.chain(optax.sgd(0.1), params_ema(0.99))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> with use_ema(model, optimizer):
        ...     prediction = model(jnp.ones((1, 2)))
    """
    if isinstance(source, EMA):
        if name is not None:
            raise ArgumentError(
                f"`name` must be None for an EMA, which holds only one average, got {name!r}"
            )
        source.apply_to(model)  # refuses another model
        live = nnx.as_pure(_selected(source, model))
        average = _shown(source)
    else:
        if not isinstance(source, nnx.Optimizer):
            raise ArgumentTypeError(
                f"`source` must be an nnx.Optimizer or an EMA, got {type(source).__name__}"
            )
        live = nnx.as_pure(nnx.state(model, source.wrt))
        average = get_params_ema(source, live, name)
    try:
        nnx.update(model, average)
        yield model
    finally:
        nnx.update(model, live)
    if any(map(_is_deleted, jax.tree.leaves(average))):
        raise StateError("the average is lost: the block donated it while it was in the model")


def _one(decay: object) -> object:
    if isinstance(decay, Mapping):
        raise ArgumentTypeError(
            "`decay` must be a number or a schedule: for several averages make several EMA objects"
        )
    return decay


def _value(variable: Any) -> Any:
    """The value that a Variable stores; its ``get_value`` and hooks may show another one."""
    return nnx.as_pure(variable)


def _put(variable: Any, value: jax.Array) -> None:
    """The inverse of :func:`_value`."""
    nnx.update(variable, value)


def _shown(average: EMA) -> Any:
    """The averages as plain arrays in the dtypes of the model, as in :meth:`EMA.apply_to`."""
    shown = dict(nnx.to_flat_state(average.params))
    averages = nnx.to_flat_state(average.averaged_parameters())
    return nnx.from_flat_state(
        {path: each.astype(_value(shown[path]).dtype) for path, each in averages}
    )


def _beside(variable: Any, value: jax.Array) -> EMAVariable:
    """A Variable for the average's own use, with the metadata (such as sharding) of the model's."""
    metadata = {**variable.get_metadata(), "ref": False, "hijax": False}
    return cast("EMAVariable", EMAVariable.from_metadata(value, metadata))


def _is_deleted(leaf: Any) -> bool:
    return (
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)  # a traced value cannot tell
        and leaf.is_deleted()
    )


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _selected(average: EMA, model: Any) -> Any:
    """The Variables of ``model`` that ``average`` averages."""

    def is_averaged(path: Path, value: Any) -> bool:
        if not isinstance(value, nnx.Variable):
            return False
        leaf = _value(value)
        if not (is_hole(leaf) or hasattr(leaf, "dtype") or isinstance(leaf, _NUMBERS)):
            raise ModelError(
                f"`{_name(path)}` holds a {type(leaf).__name__}, but EMA averages arrays: leave"
                " it out by `only`, or use params_ema in the chain of an nnx.Optimizer"
            )
        return is_inexact(leaf)

    return nnx.state(model, nnx.All(average.only, is_averaged), graph=average.graph)
