"""The state of ``params_ema``, and its check against the options of a transformation."""

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
        step: calls so far; int32 scalar, which at its end takes its last ``update_every`` values in
            turn.
        count: updates of the average made so far; int32 scalar, stays at its largest value.
        params_ema: the average, in the structure of the params; float32 or wider (or bfloat16), with
            ``optax.MaskedNode()`` where a leaf is not averaged; a dict by name if there are several averages.
        name: ``{"short": ()}`` for the name ``"short"``, ``()`` for none, more keys for several
            averages: a tree without leaves, so that names are static under ``jit`` and survive
            serialization.
        remainder: what ``compensated`` averages have beyond ``params_ema``, in its structure and
            dtypes; ``()`` without it.
        skipped: with ``on_nonfinite="skip"``, updates that were due and not made; int32 scalar,
            stays at its largest value. ``()`` otherwise.
    """

    step: jax.Array
    count: jax.Array  # type: ignore[assignment]  # optax's name for it, and tuple's for a method
    params_ema: optax.Params
    name: Label = ()
    remainder: Any = ()
    skipped: Any = ()

    def averages(self) -> dict[str | None, Any]:
        """Each average by its name; ``None`` is the name of one without."""
        if len(self.name) > 1:
            return dict(self.params_ema)
        return {next(iter(self.name), None): self.params_ema}

    def remainders(self) -> dict[str | None, Any]:
        """The remainder of each average by its name; ``()`` where there is none."""
        if len(self.name) > 1 and isinstance(self.remainder, Mapping):
            return dict(self.remainder)
        return dict.fromkeys(self.name or (None,), self.remainder)


def flats_of(
    state: ParamsEMAState, schedules: Mapping[str | None, Schedule], precision: Precision
) -> tuple[dict[str | None, Flat], dict[str | None, Flat]]:
    """Averages and remainders of a state by name, flattened; no remainders if not compensated.

    Raises:
        ArgumentError: the state has other averages or fields than these options keep.
        ModelError: the remainders are not those of the averages.
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
                f"`opt_state` must {'' if asked else 'not '}hold `{field}`, for `{option}` is"
                f" {getattr(precision, option)!r}: adapt_opt_state(opt_state, tx, params) makes a"
                " state for other options"
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
    """Trees by the name of their average, as the fields of a state hold them."""
    return dict(trees) if len(trees) > 1 else next(iter(trees.values()))


def _names(names: Iterable[str | None]) -> str:
    return ", ".join("(unnamed)" if name is None else repr(name) for name in names)
