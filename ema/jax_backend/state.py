"""The state of ``params_ema``, and the check that it fits the options of a transformation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from ema.errors import ArgumentError
from ema.jax_backend.selection import require_alike
from ema.jax_backend.trees import Flat
from ema.options import Precision
from ema.schedules import Schedule

__all__ = ["ParamsEMAState", "as_field", "flats_of"]

Label = dict[str, tuple[()]] | tuple[()]


class ParamsEMAState(NamedTuple):
    """State of :func:`~ema.jax_backend.params_ema`.

    Attributes:
        step: calls so far; an int32 scalar. At the end of int32 it repeats its last
            ``update_every`` values.
        count: updates of the average made so far; an int32 scalar, stays at its largest value.
        params_ema: the average, in the structure of the params; float32 or wider (or bfloat16).
            ``optax.MaskedNode()`` stands for a leaf that is not averaged. Several averages are a
            dict by name.
        name: ``{"short": ()}`` for the name ``"short"``, ``()`` without a name, more keys for
            several averages. This tree has no leaves, so that names are static under ``jit`` and
            survive serialization.
        remainder: the rounding errors of ``compensated`` averages, in the structure and dtypes of
            ``params_ema``; ``()`` for other averages.
        skipped: with ``on_nonfinite="skip"``, updates that were due but skipped; an int32 scalar,
            stays at its largest value. ``()`` otherwise.
    """

    step: jax.Array
    count: jax.Array  # type: ignore[assignment]  # optax's name for it, and tuple's for a method
    params_ema: optax.Params
    name: Label = ()
    remainder: Any = ()
    skipped: Any = ()

    def averages(self) -> dict[str | None, Any]:
        """Each average by its name; an average without a name has the key ``None``."""
        if len(self.name) > 1:
            return dict(self.params_ema)
        return {next(iter(self.name), None): self.params_ema}

    def remainders(self) -> dict[str | None, Any]:
        """The remainder of each average by its name; ``()`` if averages have no remainder."""
        if len(self.name) > 1 and isinstance(self.remainder, Mapping):
            return dict(self.remainder)
        return dict.fromkeys(self.name or (None,), self.remainder)


def flats_of(
    state: ParamsEMAState, schedules: Mapping[str | None, Schedule], precision: Precision
) -> tuple[dict[str | None, Flat], dict[str | None, Flat]]:
    """Averages and remainders of a state by name, flattened; no remainders if not compensated.

    Raises:
        ArgumentError: the state has other averages or fields than these options keep.
        ModelError: the remainders do not match the averages.
    """
    averages = {label: Flat.of(tree) for label, tree in state.averages().items()}
    if averages.keys() != schedules.keys():
        raise ArgumentError(
            f"`opt_state` must hold the averages {_names(schedules)}, got {_names(averages)}"
        )
    for option, field, asked in (
        ("compensated", "remainder", precision.compensated),
        ("on_nonfinite", "skipped", precision.on_nonfinite == "skip"),
    ):
        found = not _is_empty(getattr(state, field))
        # a tree without leaves has no remainder
        if asked != found and (field == "skipped" or any(map(Flat.pick, averages.values()))):
            raise ArgumentError(
                f"`opt_state` must {'' if asked else 'not '}hold `{field}`, because `{option}` is"
                f" {getattr(precision, option)!r}: adapt_opt_state(opt_state, tx, params) converts"
                " the state to these options"
            )
    if not precision.compensated:
        return averages, {}
    remainders = {label: Flat.of(tree) for label, tree in state.remainders().items()}
    for label, average in averages.items():
        require_alike(average, remainders[label])
    return averages, remainders


def _is_empty(node: Any) -> bool:
    return isinstance(node, tuple) and not node


def as_field(trees: dict[str | None, Any]) -> Any:
    """Convert trees by name to the form that a field of the state has."""
    return dict(trees) if len(trees) > 1 else next(iter(trees.values()))


def _names(names: Iterable[str | None]) -> str:
    return ", ".join("(unnamed)" if name is None else repr(name) for name in names)
