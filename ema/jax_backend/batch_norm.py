"""``recalibrate_batch_norm``: new running statistics for averaged weights.

The running statistics of a BatchNorm layer were gathered with the live weights and do not fit the
averaged weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ema.errors import ArgumentError, ArgumentTypeError, ModelError, StateError, listing
from ema.extras import require

require("flax", "jax")

from flax import linen, nnx  # noqa: E402  # after the line that says how to install it

__all__ = ["recalibrate_batch_norm"]

Forward = Callable[[Any, Any], Any]
Path = tuple[Any, ...]


def recalibrate_batch_norm(
    model: nnx.Module | linen.Module,
    batches: Iterable[Any],
    *,
    variables: Mapping[str, Any] | None = None,
    forward: Forward | None = None,
) -> Any:
    """Recompute the running statistics of BatchNorm layers in one pass over ``batches``.

    Each layer gets the mean and the (biased, as in Flax) variance of all values that it saw, over
    all batches together::

        mean = Σ x / N,    var = Σ (x − mean)² / N

    During the pass Dropout and all other layers are in evaluation mode, as when the model is used.
    For an nnx model the statistics are changed in place and nothing else; after an error the model
    is unchanged. For a linen model the new collection is returned.

    A layer that the model keeps in evaluation mode (a frozen backbone) keeps its statistics. In nnx
    this is a layer that the model calls with ``use_running_average=True``, or whose flag is True
    while the flag of another layer is False. If the class overrides ``train``, it is also a layer
    whose flag is True after ``model.train()``. In linen this is a layer that runs with
    ``use_running_average=True`` while another layer does not; for such a model, let ``forward``
    call it as in training: ``lambda apply, x: apply(x, train=True)``.

    Args:
        model: an ``nnx.Module``, inside ``use_ema`` or made by ``EMA.apply_to``, or a linen module.
        batches: inputs of the model. A batch is an array, a tuple or list (the model gets its first
            element, as in ``(inputs, labels)``), or a mapping (of keyword arguments).
        variables: for linen, ``params`` and ``batch_stats``, for instance
            ``EMATrainState.ema_variables``.
        forward: a function that calls the model on a batch. For nnx it is
            ``forward(model, batch)``, which may be jitted; a batch counts by the length of its
            first array. For linen it is ``forward(apply, batch)``, where ``apply(*args, **kwargs)``
            applies the model with its variables, without ``jit``. Even with ``train=False`` the
            layers gather their statistics, and even with ``train=True`` Dropout does nothing.

    Returns:
        ``None`` for nnx; the new ``batch_stats`` for linen.

    Raises:
        ArgumentError: ``variables`` is missing for linen, or is given for nnx.
        ArgumentTypeError: a batch has another type and ``forward`` is not given.
        ModelError: the model has no BatchNorm layer, or keeps all of them in evaluation mode.
        StateError: ``batches`` is empty, or ``forward`` made no layer gather statistics.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
        >>> recalibrate_batch_norm(model, [jnp.array([[1.0], [2.0]]), jnp.array([[6.0]])])
        >>> print(model.mean[...], model.var[...])  # of 1, 2 and 6
        [3.] [4.6666665]
    """
    if isinstance(model, linen.Module):
        if variables is None:
            raise ArgumentError("`variables` must be given for a linen model")
        return _recalibrate_linen(model, batches, variables, forward)
    if variables is not None:
        raise ArgumentError("`variables` must not be given for an nnx model, which holds its own")
    return _recalibrate_nnx(model, batches, forward or _call)


class _Pool:
    """Count, mean and squared deviations of all values that a layer saw, in float64.

    Two sets are combined as in Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample
    Variance", equation 2.1.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean: Any = 0.0
        self.squares: Any = 0.0

    def add(self, count: float, mean: Any, var: Any) -> None:
        mean, var = np.asarray(mean, np.float64), np.asarray(var, np.float64)
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + var * count + delta**2 * (self.count * count / total)
        self.count = total

    def result(self) -> tuple[Any, Any]:
        return self.mean, self.squares / self.count


def _recalibrate_nnx(model: Any, batches: Iterable[Any], forward: Forward) -> None:
    layers, gathering = _layers_of(model)
    pools = {path: _Pool() for path in gathering}
    own = {path: _finite(layer) for path, layer in gathering.items()}
    starts = dict.fromkeys(gathering, _IMPOSSIBLE)
    with _gathering(model, layers.values(), gathering.values()):
        for batch in batches:
            ran = _run(model, batch, forward, gathering, starts)
            quiet = {p: own[p] for p in gathering.keys() - ran if starts[p] is _IMPOSSIBLE}
            if quiet:  # not called, or called to normalize by the statistics that they have
                starts |= quiet
                ran = _run(model, batch, forward, gathering, starts)
            for path in ran:
                layer = gathering[path]
                pools[path].add(_length(batch), layer.mean[...], layer.var[...])
    for path, (mean, var) in _results(pools).items():
        _set(layers[path], mean, var)


def _layers_of(model: Any) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """All BatchNorm layers, and the layers whose statistics are recomputed.

    Raises:
        ModelError: the model has no such layer.
    """
    layers = {
        path: module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }
    if not layers:
        raise ModelError("`model` must have a BatchNorm layer, got none")
    kept = _kept_in_evaluation(model, layers)
    gathering = {path: layer for path, layer in layers.items() if path not in kept}
    if not gathering:
        raise ModelError(
            "`model` must have a BatchNorm layer that it does not keep in evaluation mode, got"
            f" {listing('.'.join(map(str, path)) for path in layers)}"
        )
    return layers, gathering


def _kept_in_evaluation(model: Any, layers: Mapping[Path, Any]) -> set[Path]:
    """The layers that stay in evaluation mode while the model trains; flags are restored."""

    def evaluating() -> set[Path]:
        return {path for path, layer in layers.items() if layer.use_running_average}

    now = evaluating()
    kept = now if now != layers.keys() else set()
    if type(model).train is not nnx.Module.train:
        with _put_back(model):
            model.train()
            kept |= evaluating()
            if now == layers.keys():
                model.eval()
    return kept


_IMPOSSIBLE: tuple[Any, Any] = (0.0, -1.0)
"""A mean and a variance that no batch has."""


def _finite(layer: Any) -> tuple[Any, Any]:
    """The statistics of a layer, or the initial ones if these are not finite.

    A layer that gathers multiplies its old statistics by 0, and 0 · Inf is NaN.
    """
    mean, var = layer.mean[...], layer.var[...]
    return (mean, var) if bool(jnp.isfinite(mean + var).all()) else (0.0, 1.0)


def _run(
    model: Any,
    batch: Any,
    forward: Forward,
    layers: Mapping[Path, Any],
    starts: Mapping[Path, tuple[Any, Any]],
) -> set[Path]:
    """Run one batch from the statistics ``starts``; return the layers whose statistics changed."""
    for path, layer in layers.items():
        _set(layer, *starts[path])
    forward(model, batch)
    return {
        path
        for path, layer in layers.items()
        if any(
            not np.array_equal(np.broadcast_to(old, new.shape), new, equal_nan=True)
            for old, new in zip(starts[path], (layer.mean[...], layer.var[...]), strict=True)
        )
    }


def _set(layer: Any, mean: Any, var: Any) -> None:
    for variable, value in ((layer.mean, mean), (layer.var, var)):
        new = jnp.broadcast_to(jnp.asarray(value, variable.dtype), variable.shape)
        variable[...] = jax.device_put(new, variable.get_value().sharding)


@contextmanager
def _gathering(model: Any, layers: Iterable[Any], gathering: Iterable[Any]) -> Iterator[None]:
    """Let the layers ``gathering`` take the statistics of each batch, and all others evaluate.

    At the end everything is restored.
    """
    with _put_back(model):
        model.set_attributes(deterministic=True, raise_if_not_found=False)
        for layer in layers:
            layer.use_running_average = True
        for layer in gathering:
            layer.use_running_average = False
            layer.momentum = 0.0
        yield


@contextmanager
def _put_back(model: Any) -> Iterator[None]:
    """Restore the variables of a model and the flags of its modules at the end."""
    before = nnx.as_pure(nnx.state(model))
    flags = [
        (module, name, getattr(module, name))
        for _, module in nnx.iter_modules(model)
        for name in ("deterministic", "use_running_average", "momentum")
        if name in vars(module)
    ]
    try:
        yield
    finally:
        for module, name, value in flags:
            setattr(module, name, value)
        nnx.update(model, before)


def _recalibrate_linen(
    model: linen.Module,
    batches: Iterable[Any],
    variables: Mapping[str, Any],
    forward: Forward | None,
) -> Any:
    stats = variables.get("batch_stats")
    if not jax.tree.leaves(stats):
        raise ModelError("`variables` must hold the batch_stats of a BatchNorm layer, got none")
    pools: dict[Path, _Pool] = {}
    modes: dict[Path, bool] = {}  # whether a layer evaluates in every call
    kept: set[Path] = set()

    def gather(
        run: Callable[..., Any], args: Any, kwargs: Any, context: linen.module.InterceptorContext
    ) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, linen.Dropout):
            return args[0] if args else kwargs["inputs"]
        if not isinstance(layer, linen.BatchNorm) or context.method_name != "__call__":
            return run(*args, **kwargs)
        place = ("batch_stats", *layer.path)
        modes[place] = modes.get(place, True) and _evaluates(layer, args, kwargs)
        if place in kept:
            return run(*args, **kwargs)
        x, mask = args[0], kwargs.get("mask")
        # linen modules are frozen; either flag may be set, and setting both is an error
        own = {"use_running_average": layer.use_running_average, "momentum": layer.momentum}
        try:
            object.__setattr__(layer, "use_running_average", False)
            object.__setattr__(layer, "momentum", 0.0)
            result = run(x, mask=mask)
        finally:
            for name, value in own.items():
                object.__setattr__(layer, name, value)
        seen = layer.variables["batch_stats"]
        values = x.size if mask is None else int(np.broadcast_to(mask, x.shape).sum())
        pool = pools.setdefault(place, _Pool())
        pool.add(values / seen["mean"].size, seen["mean"], seen["var"])
        return result

    def apply(*args: Any, **kwargs: Any) -> Any:
        with linen.intercept_methods(gather):
            return model.apply(variables, *args, **{"mutable": ["batch_stats"], **kwargs})

    # An earlier trace does not contain the interceptor, and a trace made here would outlive it.
    with jax.disable_jit():
        for number, batch in enumerate(batches):
            _call(apply, batch) if forward is None else forward(apply, batch)
            if not number and len({*modes.values()}) > 1:
                kept |= {place for place, evaluates in modes.items() if evaluates}
                pools.clear()  # the kept layers normalized this batch by its own statistics
                _call(apply, batch) if forward is None else forward(apply, batch)
    results = _results(pools)

    def new(path: Any, leaf: Any) -> Any:
        *layer, kind = (entry.key for entry in path)
        pair = results.get(("batch_stats", *layer))
        if pair is None or kind not in ("mean", "var"):
            return leaf
        return jax.device_put(
            jnp.asarray(pair[kind == "var"], jnp.result_type(leaf)), getattr(leaf, "sharding", None)
        )

    return jax.tree_util.tree_map_with_path(new, stats)


def _evaluates(layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a linen layer was called to use its running statistics."""
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    return bool(layer.use_running_average if given is None else given)


def _results(pools: Mapping[Path, _Pool]) -> dict[Path, tuple[Any, Any]]:
    results = {path: pool.result() for path, pool in pools.items() if pool.count}
    if not results:
        raise StateError(
            "`batches` must make a BatchNorm layer gather statistics: there were none, or `forward`"
            " called the layers with use_running_average=True"
        )
    return results


def _call(model: Callable[..., Any], batch: Any) -> Any:
    if isinstance(batch, jax.Array | np.ndarray):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and batch:
        return model(batch[0])
    raise ArgumentTypeError(
        "`batches` must hold arrays, tuples or mappings unless `forward` is given,"
        f" got {type(batch).__name__}"
    )


def _length(batch: Any) -> float:
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf):
            return float(np.shape(leaf)[0])
    return 1.0
