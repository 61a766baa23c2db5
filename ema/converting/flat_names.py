"""Find the averages in a flat state dict by the first word of each name: ``model_ema.…``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ema.converting.trees import (
    Chosen,
    IsTensor,
    KeyPath,
    children,
    mostly,
    shape_of,
    without_shared_prefixes,
)
from ema.converting.words import MAYBE, NO_WEIGHTS, SURE, may_be_of, words
from ema.errors import CheckpointError, listing

__all__ = ["prefixed"]

_COUNTERS = ("decay", "num_updates", "initted", "step")


def prefixed(
    tree: Any, is_tensor: IsTensor, path: KeyPath, proposed: list[str]
) -> Iterator[tuple[str, Chosen]]:
    """Find groups such as ``model_ema.…`` beside ``model.…``, or ``ema.…`` beside all other names.

    Yields:
        The values that ``key`` would take, and where the average lies. Groups that may be averages, but are not
        certain, go to ``proposed``.
    """
    shapes = _shapes(tree, is_tensor)
    plain, shared = without_shared_prefixes(shapes)
    groups = _by_first_word(plain)
    called = {prefix for prefix in groups if words(prefix) & (SURE | MAYBE)}
    live = {new: old for new, old in plain.items() if new.partition(".")[0] not in called}
    plain_groups = {name: group for name, group in groups.items() if name not in called}
    for prefix in sorted(called):
        said, own = words(prefix), groups[prefix]
        label = ".".join((*path, shared + prefix))
        others = [group for name, group in plain_groups.items() if may_be_of(said, words(name))]
        if said <= SURE:
            others.append(live)
        chosen = None
        if said & SURE and not said & NO_WEIGHTS:
            alone = not live and len(called) == 1
            chosen = _names_of(own, others, shapes, plain, groups, alone=alone)
        if chosen is None:
            proposed.append(label)
            continue
        beside = _beside(tree, own, set(chosen.values()))
        kind = f"`{label}.…` of a state dict"
        yield label, Chosen(path=path, kind=kind, names=chosen, beside=beside)


def _beside(tree: Any, own: Mapping[str, str], used: set[str]) -> dict[str, Any]:
    """Everything in a group besides its averages, by short name."""
    return {short: tree[old] for short, old in own.items() if old not in used}


def _shapes(tree: Any, is_tensor: IsTensor) -> dict[str, tuple[int, ...]]:
    return {name: shape_of(child) for name, child in children(tree) if is_tensor(child)}


def _by_first_word(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Group names by their first word. Each group maps the rest of a name to its value."""
    groups: dict[str, dict[str, str]] = {}
    for name, value in names.items():
        first, separator, rest = name.partition("." if "." in name else "/")
        if separator and rest:
            groups.setdefault(first, {})[rest] = value
    return groups


def _names_of(
    own: Mapping[str, str],
    others: Sequence[Mapping[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    plain: Mapping[str, str],
    groups: Mapping[str, Mapping[str, str]],
    *,
    alone: bool,
) -> dict[str, str] | None:
    """Map new names of averages to names in the state dict; None if nothing shows that they are averages."""
    stripped = without_shared_prefixes(own)[0]
    names = {new: own[short] for new, short in stripped.items()}
    mine = {(new, shapes[old]) for new, old in names.items() if shapes[old]}
    raw = [{(short, shapes[old]) for short, old in group.items()} for group in others]
    if mine and any(mostly(mine, other) for other in raw):
        return names
    if dotless := _with_dots(own, plain, groups):
        return dotless
    return names if alone and not own.keys() >= {"decay", "num_updates"} else None


def _with_dots(
    own: Mapping[str, str], plain: Mapping[str, str], groups: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """Restore the dots in the names of latent diffusion's ``LitEma``, with the names of the raw weights.

    ``model_ema.diffusion_modelinweight`` is the average of ``model.diffusion_model.in.weight``.
    """
    best: dict[str, str] = {}
    new_of = {old: new for new, old in plain.items()}
    for group in groups.values():
        if group is own:
            continue
        by_dotless: dict[str, list[str]] = {}
        for rest, old in group.items():
            by_dotless.setdefault(rest.replace(".", ""), []).append(old)
        found = {rest: by_dotless[rest] for rest in own if rest in by_dotless}
        if twice := [names for names in found.values() if len(names) > 1]:
            raise CheckpointError(
                f"{listing(twice[0])} are the same without dots, so it is ambiguous which of them the"
                " average belongs to"
            )
        if len(found) > len(best):
            best = {new_of[names[0]]: own[rest] for rest, names in found.items()}
    unmatched = len(own) - len(best)
    return best if best and unmatched <= len(_COUNTERS) else {}
