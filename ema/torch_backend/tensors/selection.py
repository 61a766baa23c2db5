"""Select the tensors of a model that are averaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn, strided
from torch.nn.parameter import is_lazy

from ema.errors import ArgumentError, ArgumentTypeError, ModelError, listing
from ema.torch_backend.tensors.copying import has_memory, kind_of, without_values
from ema.torch_backend.tensors.memory import is_dense
from ema.torch_backend.tensors.names import NamedTensors, named_tensors
from ema.torch_backend.tensors.sharding import (
    box_of,
    check_supported,
    fully_sharded,
    is_sharded,
    local_of,
    reshard,
)
from ema.torch_backend.tensors.special_buffers import FirstLook

__all__ = ["NOT_BUILT", "ON_META", "Rules", "Selection", "select"]

NOT_BUILT = "not built yet"
ON_META = "on the meta device"


@dataclasses.dataclass(frozen=True)
class Rules:
    """The user's rules that select tensors: shell patterns on canonical names.

    Attributes:
        include: only these parameters, and these from the start even where they do not require
            grad. None: every parameter that requires grad.
        exclude: parameters that are never averaged.
        buffers: patterns of buffers and ``"copy"`` (the model's own are used as they are) or
            ``"average"`` (if of floating point); the first match counts, no match copies. Patterns
            that end in ``*`` alone ask in bulk, others name the buffer itself.
    """

    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    buffers: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, include: object, exclude: object, buffers: object) -> Rules:
        """Check the arguments that ``EMAModel`` was given."""
        by_pattern = {"*": buffers} if isinstance(buffers, str) else buffers
        if not isinstance(by_pattern, Mapping):
            raise ArgumentTypeError(
                "`buffers` must be 'copy', 'average' or a mapping from patterns to these,"
                f" got {buffers!r}"
            )
        for pattern, rule in by_pattern.items():
            if rule not in ("copy", "average"):
                raise ArgumentError(
                    f"`buffers` must be 'copy' or 'average', got {rule!r} for {pattern!r}"
                )
        return cls(
            include=None if include is None else _patterns("include", include),
            exclude=() if exclude is None else _patterns("exclude", exclude),
            buffers=tuple(by_pattern.items()),
        )

    @property
    def average_buffers(self) -> bool:
        """Whether any buffer may be averaged."""
        return any(rule == "average" for _, rule in self.buffers)

    def wants(self, names: Collection[str], *, requires_grad: bool) -> bool:
        """Whether a parameter is averaged; it has several names where it is tied."""
        if _matches(self.exclude, names):
            return False
        return requires_grad if self.include is None else _matches(self.include, names)

    def wants_buffer(self, names: Collection[str]) -> bool:
        """Whether a buffer is averaged, unless that would break it."""
        return self._buffer_rule(names)[1] == "average"

    def names_buffer(self, names: Collection[str]) -> bool:
        """Whether the rule for a buffer names it, so that it is averaged even if that breaks it."""
        return not set(self._buffer_rule(names)[0].rpartition(".")[2]) <= {"*"}

    def _buffer_rule(self, names: Collection[str]) -> tuple[str, str]:
        """The pattern that decides about a buffer, and its rule."""
        rules = (rule for rule in self.buffers if _matches((rule[0],), names))
        return next(rules, ("*", "copy"))

    def check_used(self, tensors: NamedTensors) -> None:
        """Refuse a pattern that matches nothing: it would go unnoticed for a whole run."""
        for argument, patterns, names in (
            ("include", self.include or (), tensors.parameters),
            ("exclude", self.exclude, tensors.parameters),
            (
                "buffers",
                (pattern for pattern, _ in self.buffers if pattern != "*"),
                tensors.buffers,
            ),
        ):
            for pattern in patterns:
                if not _matches((pattern,), names):
                    raise ModelError(
                        f"`{argument}` must match something, got {pattern!r}; the model has"
                        f" {listing(names) or 'none'}"
                    )


def _patterns(argument: str, value: object) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Collection):
        raise ArgumentTypeError(f"`{argument}` must be a pattern or several, got {value!r}")
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentTypeError(f"`{argument}` must hold strings, got {pattern!r}")
    return patterns


def _matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    names = tuple(names)
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The tensors of a model by canonical name, each stretch of memory once.

    Attributes:
        averaged: live tensors that are averaged.
        others: parameters that are not: frozen, excluded, of integers, without memory yet.
        buffers: buffers that are not averaged.
        ties: further names of any of these, to the first name and the tensor of this name.
        waiting: the tensors of ``others`` that are averaged as soon as they require grad.
        pending: names of parameters, and of buffers to be averaged, that have no values yet, and
            why: :data:`NOT_BUILT` (lazy modules) or :data:`ON_META`.
        origins: canonical name to the name that the same average has had so far, for what has one.
        paths: canonical name to the path in the model as it is wrapped now.
        modules: every module once.
        late: whether some of ``others`` and ``buffers`` are averaged from the next update on.
    """

    averaged: dict[str, Tensor]
    others: dict[str, Tensor]
    buffers: dict[str, Tensor]
    ties: dict[str, tuple[str, Tensor]]
    waiting: list[Tensor]
    pending: dict[str, str]
    origins: dict[str, str]
    paths: dict[str, str]
    modules: list[nn.Module]
    late: bool = False

    def under_its_own_names(self) -> Selection:
        """The same for averages that have got the names of their tensors by now."""
        return dataclasses.replace(self, origins={name: name for name in self.origins})

    def first_name(self, name: str) -> str:
        """The name under which a tensor is kept here, given any of its names."""
        return self.ties[name][0] if name in self.ties else name

    def tied_tensors(self) -> dict[str, Tensor]:
        """The tensors that have another one's memory by their own names; each may be a view of it."""
        return {name: tied for name, (_, tied) in self.ties.items()}

    def tied_to(self, name: str) -> tuple[Tensor, Tensor]:
        """The tensor of the first name, and the one that is tied to it and has this name."""
        first, tied = self.ties[name]
        return {**self.averaged, **self.others, **self.buffers}[first], tied


def select(
    model: nn.Module,
    rules: Rules,
    tracked: Collection[str] = (),
    *,
    known: Mapping[str, Tensor] | None = None,
    first_look: FirstLook | None = None,
    into: bool = False,
) -> Selection:
    """Find the tensors of ``model`` that ``rules`` select, and those that are ``tracked`` already.

    Args:
        model: is walked through once.
        rules: the user's.
        tracked: names of tensors that have an average, whatever the rules say now.
        known: those tensors as they were last seen. One that has another name by now is known by
            its identity, and takes its average along.
        first_look: decides which buffers must not be averaged, and remembers it.
        into: whether averages are only written into these tensors, not made of them.

    Raises:
        ArgumentTypeError: ``model`` is not a module.
        ModelError: a pattern matches nothing; two tensors have one name or share a part of their
            memory; one is to be averaged and cannot be (sparse, repeating its elements, float8,
            quantized, on the meta device), or is kept by an engine that leaves nothing to average
            (FSDP1, ZeRO-3).
    """
    found = named_tensors(model)
    if gathered := fully_sharded(found.modules):
        reshard(gathered)
        found = named_tensors(model)
    check_supported(found.modules, found.parameters)
    rules.check_used(found)
    choice = _Choice(found, rules, tracked, known or {}, first_look or FirstLook(), into=into)
    selection = Selection(
        averaged={},
        others={},
        buffers={},
        ties={},
        waiting=[],
        pending={},
        origins={},
        paths=found.paths,
        modules=found.modules,
    )
    for names in _names_by_memory(choice.tensors):
        choice.sort(names, selection)
    _check_disjoint(selection)
    return selection


class _Choice:
    """Decides about one tensor after the other."""

    def __init__(
        self,
        found: NamedTensors,
        rules: Rules,
        tracked: Collection[str],
        known: Mapping[str, Tensor],
        first_look: FirstLook,
        *,
        into: bool,
    ) -> None:
        self._into = into
        self._found = found
        self._rules = rules
        self._tracked = tracked
        self._known = {id(tensor): name for name, tensor in known.items() if name in tracked}
        self._first_look = first_look
        self.tensors: dict[str, Tensor] = {**found.parameters, **found.buffers}
        present = {id(tensor) for tensor in self.tensors.values()}
        self._elsewhere = {name for key, name in self._known.items() if key in present}

    def sort(self, names: list[str], selection: Selection) -> None:
        """Put the tensor that has these names where it belongs."""
        first, tensor = names[0], self.tensors[names[0]]
        selection.ties.update({name: (first, self.tensors[name]) for name in names[1:]})
        parameters = [self._found.parameters[n] for n in names if n in self._found.parameters]
        wanted = self._wants(names, parameters, selection)
        origin = self._origin(names)
        if origin is not None:
            selection.origins[first] = origin
        if wanted or (origin is not None and not is_lazy(tensor)):
            _check_averageable(first, tensor, into=self._into)
            selection.averaged[first] = tensor
        else:
            (selection.others if parameters else selection.buffers)[first] = tensor

    def _wants(self, names: list[str], parameters: list[Tensor], selection: Selection) -> bool:
        """Whether the tensor with these names is to be averaged now, by the rules."""
        tensor = self.tensors[names[0]]
        if is_lazy(tensor) or tensor.is_meta:
            if parameters or self._rules.wants_buffer(names):
                reason = NOT_BUILT if is_lazy(tensor) else ON_META
                selection.pending.update(dict.fromkeys(names, reason))
            return False
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return False
        if parameters:
            return self._wants_parameter(names, parameters, selection.waiting)
        return self._wants_buffer(names, tensor)

    def _wants_parameter(
        self, names: list[str], parameters: list[Tensor], waiting: list[Tensor]
    ) -> bool:
        requires_grad = any(parameter.requires_grad for parameter in parameters)
        wanted = self._rules.wants(names, requires_grad=requires_grad)
        if not wanted and self._rules.wants(names, requires_grad=True):
            waiting.extend(parameters)
        return wanted

    def _wants_buffer(self, names: list[str], buffer: Tensor) -> bool:
        if not self._rules.wants_buffer(names):
            return False
        if self._rules.names_buffer(names):
            return True
        return self._first_look.allows(names[0], buffer, self._found.owners[names[0]])

    def _origin(self, names: list[str]) -> str | None:
        """The name so far of the average of a tensor, or None where it has none.

        A tensor that is known takes its average along to another name. An unknown one takes the
        average of its name, unless that goes elsewhere with the tensor that it belongs to.
        """
        for name in names:
            if (origin := self._known.get(id(self.tensors[name]))) is not None:
                return origin
        left = (name for name in names if name in self._tracked and name not in self._elsewhere)
        return next(left, None)


def _names_by_memory(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that stand for the same memory, in the order of the first of them."""
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        key: object = id(tensor)
        if tensor.layout == strided and not is_lazy(tensor) and _address(tensor):
            here = local_of(tensor)
            shape = () if is_dense(here) else (here.shape, here.stride())
            key = (_address(tensor), here.dtype, here.numel(), shape)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def _address(tensor: Tensor) -> int:
    """Where its elements here begin; 0 where there are none (meta, empty, wrapper subclasses)."""
    here = local_of(tensor) if is_sharded(tensor) else tensor
    return here.data_ptr() if here.numel() else 0


def _check_averageable(name: str, tensor: Tensor, *, into: bool) -> None:
    if reason := without_values(tensor):
        raise ModelError(f"`{name}` is {reason}")
    left_out = "exclude it"
    if not isinstance(tensor, nn.Parameter):
        left_out = f"give it a rule of its own, buffers={{{name!r}: 'copy', …}}"
    if tensor.dtype.itemsize == 1 and not into:
        raise ModelError(
            f"`{name}` is {tensor.dtype}, in which weights cannot be averaged: {left_out}"
        )
    if is_sharded(tensor):
        try:
            box_of(tensor)
        except ModelError as error:
            raise ModelError(f"`{name}`: {error}") from None
        tensor = local_of(tensor)
    _check_memory(name, tensor, left_out)


def _check_memory(name: str, tensor: Tensor, left_out: str) -> None:
    if tensor.layout != strided:
        raise ModelError(f"`{name}` has the layout {tensor.layout}, only dense tensors average")
    if tensor.is_conj() or tensor.is_neg():
        raise ModelError(f"`{name}` is a view that conjugates or negates: take its resolve_conj()")
    if tensor.numel() and not has_memory(tensor):
        raise ModelError(f"`{name}` is {kind_of(tensor)} without memory of its own: {left_out}")
    repeats = any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    if tensor.numel() and repeats:
        raise ModelError(f"`{name}` is expanded: its elements share memory, so none can be swapped")


def _check_disjoint(selection: Selection) -> None:
    """Refuse an averaged tensor that shares a part of its memory with another one."""
    spans = []
    for kind in (selection.averaged, selection.others, selection.buffers):
        for name, tensor in kind.items():
            if tensor.layout == strided and not is_lazy(tensor) and _address(tensor):
                here = local_of(tensor)
                last = sum(
                    stride * (size - 1)
                    for stride, size in zip(here.stride(), here.shape, strict=True)
                )
                end = _address(tensor) + (last + 1) * here.element_size()
                spans.append((_address(tensor), end, name, kind is selection.averaged))
    reach = {True: (0, ""), False: (0, "")}  # how far memory is taken, by averaged ones or not
    for start, end, name, averaged in sorted(spans):
        for kind_averaged, (taken, other) in reach.items():
            if start < taken and (averaged or kind_averaged):
                raise ModelError(f"`{other}` and `{name}` share a part of their memory")
        reach[averaged] = max(reach[averaged], (end, name))
