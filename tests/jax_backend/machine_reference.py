"""What the design promises of an average, in NumPy, one leaf and one step at a time.

Nothing here is fast, and nothing of JAX computes. An average that moves is followed in extended
precision, with a bound of what float32 may have rounded away; one that is copied or left alone is
known to the bit, and so is one in bfloat16: it is what is stored, the exact step, and the chance.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ema.rounding import FIRST, SECOND, key_of, stream_of
from tests.jax_backend.machine_options import decay_at
from tests.jax_backend.machine_trees import Leaf

__all__ = ["Group", "assert_bits", "same_bits", "stored"]

Array = np.ndarray[Any, Any]
EXACT = np.longdouble
BF16 = jnp.dtype(jnp.bfloat16)
TINY = np.finfo(np.float32).tiny


def stored(value: Any) -> Array:
    """A copy of an array of JAX, in memory of its own."""
    return np.array(value, copy=True)


def same_bits(ours: Array, theirs: Array) -> bool:
    """Whether two arrays have one dtype, shape and value; one NaN is as good as another."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if ours.dtype.kind in "iub":
        return bool(np.array_equal(ours, theirs))
    ours, theirs = flat(ours), flat(theirs)
    return bool(np.all((ours == theirs) | (np.isnan(ours) & np.isnan(theirs))))


def assert_bits(what: str, ours: Array, theirs: Array) -> None:
    """Two arrays are the same."""
    assert same_bits(ours, theirs), f"{what} is {ours!r}, expected {theirs!r}"


def flat(value: Array) -> Array:
    """All numbers in a row, complex ones as pairs."""
    value = np.ascontiguousarray(value).reshape(-1)
    return value.view(np.zeros((), value.dtype).real.dtype) if value.dtype.kind == "c" else value


def accumulator_of(leaf: Leaf, chosen: Any) -> np.dtype[Any]:
    """The dtype of the average of a leaf, by the documentation."""
    if chosen is None:
        return np.promote_types(leaf.dtype, np.float32)
    if leaf.dtype.kind != "c":
        return jnp.dtype(chosen)
    return np.dtype(np.complex128 if chosen == np.float64 else np.complex64)


@dataclasses.dataclass
class Track:
    """One average of one leaf.

    Attributes:
        name: of the leaf.
        shape: of the leaf.
        dtype: of the average.
        value: the average as it was last seen.
        remainder: likewise; zeros of a plain one.
        exact: average and remainder, in extended precision.
        slack: how far from it float arithmetic may be, for each number.
        allowed: what the average can be after this step; None where ``exact`` decides.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    compensated: bool
    value: Array
    remainder: Array
    exact: Array
    slack: Array
    allowed: list[Array] | None = None
    kept: bool = True

    @classmethod
    def of(cls, name: str, leaf: Leaf, params: Array, options: Mapping[str, Any]) -> Track:
        """The reference of a leaf with this value."""
        dtype = accumulator_of(leaf, options.get("accumulator_dtype"))
        nothing = np.zeros(0)
        compensated = options.get("compensated", False)
        track = cls(name, leaf.shape, dtype, compensated, nothing, nothing, nothing, nothing)
        track.copy(params)
        track.settle()
        return track

    @property
    def unit(self) -> Any:
        """Half of the distance from 1 to the next number, of the arithmetic."""
        return EXACT(
            2.0**-53 if self.dtype.itemsize >= 8 and self.dtype != np.complex64 else 2.0**-24
        )

    def live(self, params: Array) -> Array:
        """The params in the dtype of the average."""
        return flat(params.astype(np.float32) if self.dtype == BF16 else params.astype(self.dtype))

    def copy(self, params: Array) -> None:
        """The average becomes the params."""
        live = self.live(params)
        self.exact, self.slack = live.astype(EXACT), np.zeros(live.shape, EXACT)
        self.allowed, self.kept = [live.astype(self._real)], False

    def leave(self) -> None:
        """Nothing of it changes."""
        self.allowed, self.kept = None, True

    @property
    def _real(self) -> np.dtype[Any]:
        return np.zeros((), self.dtype).real.dtype if self.dtype != BF16 else BF16

    def move(self, params: Array, decay: float, chance: int | None, *, inexact: bool) -> None:
        """One update.

        Args:
            params: the live value.
            decay: of this update.
            chance: the key of its random bits; None rounds to nearest.
            inexact: whether the weight comes out of a formula, and is 0 or 1 at most by accident.
        """
        weight = np.float64(1) - np.float64(decay)
        if not inexact and weight == 0:
            self.leave()
        elif not inexact and weight == 1:
            self.copy(params)
        elif weight.astype(np.float32 if self.dtype == BF16 else self._real) == 1:
            self.copy(params)
            if self.dtype != BF16:
                self.allowed, self.slack = None, self.slack + 8 * self.unit * np.abs(self.exact)
        elif self.dtype == BF16:
            self._move_narrow(self.live(params), np.float32(weight), chance)
        else:
            self._move_wide(self.live(params).astype(EXACT), EXACT(weight))

    def _move_wide(self, live: Array, weight: Any) -> None:
        before = self.exact
        distance = np.abs(live - before)
        self.exact = before + weight * (live - before)
        self.exact[~np.isfinite(before)] = np.inf  # whatever is not finite stays so
        reach = np.maximum(np.abs(live), np.abs(before))
        if self.compensated:
            lost = 8 * self.unit * (weight * distance + self.unit * reach)
        else:
            lost = 4 * self.unit * (distance + reach)
        self.slack = self.slack + lost + EXACT(1e-15) * distance + TINY  # 1 − decay is rounded too
        self.allowed, self.kept = None, False

    def _move_narrow(self, live: Array, weight: Any, chance: int | None) -> None:
        average = self.value.astype(np.float32)
        distance = live - average
        if weight < 0.5:
            wide = average.astype(np.float64) + np.float64(weight) * distance
        else:
            wide = live.astype(np.float64) - distance.astype(np.float64) * (np.float32(1) - weight)
        nearest = wide.astype(np.float32)
        inf = np.float32(np.inf)
        near = (nearest, np.nextafter(nearest, -inf), np.nextafter(nearest, inf))
        self.allowed, self.kept = [_rounded(x, chance) for x in near], False

    def settle(self, value: Array | None = None, remainder: Array | None = None) -> None:
        """See what has become of it; without arguments it is as expected.

        Raises:
            AssertionError: it is something else.
        """
        if value is None:
            self.value, self.remainder = self.allowed[0], np.zeros_like(self.allowed[0])
            self.leave()
            return
        what = f"the average of `{self.name}`"
        assert value.dtype == self.dtype, f"{what} is in {value.dtype}, expected {self.dtype}"
        assert value.shape == self.shape, f"{what} has shape {value.shape}, expected {self.shape}"
        value = flat(value)
        remainder = np.zeros_like(value) if remainder is None else flat(remainder)
        if self.kept:
            assert_bits(f"{what}, which nothing has changed,", value, self.value)
            assert_bits(f"the remainder of `{self.name}`", remainder, self.remainder)
        elif self.allowed is not None:
            self._check_allowed(what, value)
            assert_bits(f"the remainder of `{self.name}`", remainder, np.zeros_like(remainder))
        else:
            self._check_exact(what, value, remainder)
        self.value, self.remainder = value, remainder
        self.leave()

    def _check_allowed(self, what: str, value: Array) -> None:
        fits = np.zeros(value.shape, bool)
        with np.errstate(all="ignore"):
            for allowed in self.allowed:
                fits |= value == allowed
                fits |= ~np.isfinite(value) & ~np.isfinite(allowed)
        assert fits.all(), f"{what} is {value!r}, expected one of {self.allowed!r}"

    def _check_exact(self, what: str, value: Array, remainder: Array) -> None:
        with np.errstate(all="ignore"):
            found = value.astype(EXACT) + remainder.astype(EXACT)
        finite = np.isfinite(self.exact)
        assert np.array_equal(np.isfinite(found), finite), f"{what} is {value!r}, {self.exact!r}"
        off = np.abs(found[finite] - self.exact[finite])
        assert (off <= self.slack[finite]).all(), (
            f"{what} is {found!r}, expected {self.exact!r} within {self.slack!r}"
        )
        small = np.abs(remainder[finite]) <= 2 * self.unit * np.abs(value[finite]) + TINY
        assert small.all(), f"the remainder of `{self.name}` is {remainder!r} beside {value!r}"

    def array(self) -> Array:
        """The average as it was last seen, in its shape."""
        value = self.value.view(self.dtype) if self.dtype.kind == "c" else self.value
        return value.reshape(self.shape)

    def load(self, other: Track) -> None:
        """What a file of ``other`` makes of it."""
        self.value = other.value
        with_remainder = self.compensated and other.compensated
        self.remainder = other.remainder if with_remainder else np.zeros_like(self.value)
        self.exact, self.slack = other.exact, other.slack
        if other.compensated and not with_remainder:
            self.exact, self.slack = self.value.astype(EXACT), np.zeros_like(self.slack)
        self.leave()


def _rounded(x: Array, chance: int | None) -> Array:
    """float32 to bfloat16, up by chance or to nearest."""
    bits = x.view(np.uint32)
    with np.errstate(over="ignore"):
        if chance is None:
            up = np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))
        else:
            up = _mix(np.arange(x.size, dtype=np.uint32) ^ np.uint32(chance)) >> np.uint32(16)  # type: ignore[assignment]
        moved = (bits + up) >> np.uint32(16)
    moved = np.where(np.isfinite(x), moved, np.uint32(0x7FC0)).astype(np.uint16)
    return moved.view(BF16)


def _mix(x: Array) -> Array:
    x = x ^ x >> np.uint32(16)
    x = x * np.uint32(FIRST)
    x = x ^ x >> np.uint32(15)
    x = x * np.uint32(SECOND)
    return x ^ x >> np.uint32(16)


@dataclasses.dataclass
class Group:
    """One ``params_ema`` by its description.

    Attributes:
        options: keyword arguments of ``params_ema``.
        here: numbers of the leaves that it sees.
        leaves: all leaves of the tree.
        names: of all leaves.
    """

    options: dict[str, Any]
    here: frozenset[int]
    leaves: Sequence[Leaf]
    names: Sequence[str]
    step: int = 0
    count: int = 0
    skipped: int = 0
    tracks: dict[str | None, dict[int, Track]] = dataclasses.field(default_factory=dict)

    def begin(self, params: Sequence[Array | None]) -> Group:
        """As ``init`` does."""
        self.step = self.count = self.skipped = 0
        self.tracks = {
            label: {
                i: Track.of(self.names[i], self.leaves[i], params[i], self.options)
                for i in self.averaged
            }
            for label in self.labels
        }
        return self

    @property
    def averaged(self) -> list[int]:
        """Numbers of the leaves that are averaged."""
        return [i for i in sorted(self.here) if self.leaves[i].averaged]

    @property
    def decays(self) -> dict[str | None, Any]:
        """By the name of the average."""
        decay = self.options["decay"]
        return dict(decay) if isinstance(decay, dict) else {self.options.get("name"): decay}

    @property
    def labels(self) -> list[str | None]:
        return list(self.decays)

    @property
    def guard(self) -> str:
        return self.options.get("on_nonfinite", "propagate")

    def copy(self) -> Group:
        """One that goes its own way."""
        return copy.deepcopy(self)

    def raises(self, params: Sequence[Array | None]) -> bool:
        """Whether the next update with these params is refused."""
        elapsed = self.step + 1 - self.options["update_after_step"]
        due = elapsed > 0 and elapsed % self.options["update_every"] == 0
        return self.guard == "raise" and due and not self._finite(params)

    def _finite(self, params: Sequence[Array | None]) -> bool:
        return all(np.isfinite(flat(params[i])).all() for i in self.averaged)

    def update(self, params: Sequence[Array | None]) -> None:
        """One step that ends with these params."""
        self.step += 1
        elapsed = self.step - self.options["update_after_step"]
        every = self.options["update_every"]
        if elapsed <= 0:
            for i, track in self._all():
                track.copy(params[i])
            return
        if elapsed % every:
            return
        if self.guard == "skip" and not self._finite(params):
            self.skipped += 1
            return
        self.count += 1
        for label, decay in self.decays.items():
            beta = decay_at(decay, self.count, every)
            inexact = not isinstance(decay, float)
            with np.errstate(all="ignore"):  # NaN and Inf
                for i, track in self.tracks[label].items():
                    track.move(params[i], beta, self._chance(track.name), inexact=inexact)

    def _chance(self, name: str) -> int | None:
        if not self.options.get("stochastic_rounding", True):
            return None
        return key_of(stream_of(name, self.options.get("seed", 0)), self.count)

    def _all(self) -> list[tuple[int, Track]]:
        return [pair for tracks in self.tracks.values() for pair in tracks.items()]

    def check(self, node: Any, flatten: Any) -> None:
        """The state of the library is what was expected; goes on from there.

        Args:
            node: a ``ParamsEMAState``.
            flatten: from a tree of params to its leaves.
        """
        skipped = 0 if isinstance(node.skipped, tuple) else int(node.skipped)
        counters = (int(node.step), int(node.count), skipped)
        assert counters == (self.step, self.count, self.skipped), (
            f"step, count and skipped are {counters},"
            f" expected {(self.step, self.count, self.skipped)}"
        )
        assert isinstance(node.skipped, tuple) == (self.guard != "skip")
        averages, remainders = node.averages(), node.remainders()
        assert list(averages) == sorted(self.labels, key=str)
        for label, tracks in self.tracks.items():
            values = flatten(averages[label])
            lost = flatten(remainders[label]) if self.options.get("compensated") else None
            for i, value in enumerate(values):
                if i in tracks:
                    remainder = None if lost is None else stored(lost[i])
                    tracks[i].settle(stored(value), remainder)
                else:
                    assert not jax.tree.leaves(value), f"`{self.names[i]}` is averaged"
