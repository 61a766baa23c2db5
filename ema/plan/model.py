"""The costs of an average on a number of ranks: bytes, traffic and time, computed by a model.

An update does a few operations for each number that it moves, so that moving it is what takes the
time. The model counts bytes and divides by bandwidths; ``docs/scaling.md`` compares it with
measurements and says what it leaves out.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

from ema import validate
from ema.errors import ArgumentError, ArgumentTypeError
from ema.options import OnNonfinite
from ema.plan.table import table

__all__ = ["CHUNK", "Plan", "Traffic", "plan_ema"]

CHUNK = 1 << 20
NARROW_CHUNK = 1 << 19
"""Elements that pass through a buffer at a time."""

_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "f32": "float32",
    "fp32": "float32",
    "f64": "float64",
    "fp64": "float64",
}
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_AVERAGES = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one update reads and writes, a parameter.

    Attributes:
        params: of the live weights, read.
        guard: of the live weights, read once more by ``on_nonfinite="skip"`` or ``"raise"``.
        average: read and written.
        remainder: of a compensated average, read and written.
    """

    params: int
    guard: int
    average: int
    remainder: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.params + self.guard + self.average + self.remainder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The costs of one average; see :func:`plan_ema` for the settings and the bandwidths.

    Bytes and seconds without a word about it are those of the rank that holds most. Where the
    average is offloaded, ``average_bytes`` and ``remainder_bytes`` lie in host memory.
    """

    params: int
    ranks: int
    dtype: str
    param_dtype: str
    compensated: bool
    on_nonfinite: OnNonfinite
    update_every: int
    sharded: bool
    offload: bool
    memory_bandwidth: float
    host_link_bandwidth: float
    host_memory_bandwidth: float
    network_bandwidth: float
    disk_bandwidth: float
    update_overhead: float
    step_seconds: float | None

    @property
    def params_per_rank(self) -> int:
        """Parameters whose average a rank holds."""
        return -(-self.params // self.ranks) if self.sharded else self.params

    @property
    def average_bytes(self) -> int:
        """Bytes of the average on a rank, without its remainder."""
        return self.params_per_rank * _BYTES[self.dtype]

    @property
    def remainder_bytes(self) -> int:
        """Bytes of the remainder on a rank, 0 if the average is not compensated."""
        return self.average_bytes if self.compensated else 0

    @property
    def total_bytes(self) -> int:
        """Bytes of average and remainder on all ranks together."""
        return self.file_bytes * (1 if self.sharded else self.ranks)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffer that an update on a CPU needs besides the average.

        A chunk of params is converted; a compensated average needs two chunks more, and one in
        bfloat16, which is computed in float32, four for random bits.
        """
        chunks = min(CHUNK, self.params_per_rank) * (3 if self.compensated else 1)
        if self.dtype == "bfloat16":
            chunks += 4 * min(NARROW_CHUNK, self.params_per_rank)
        return chunks * max(4, _BYTES[self.dtype])

    @property
    def traffic(self) -> Traffic:
        """Bytes that an update reads and writes, a parameter."""
        read = _BYTES[self.param_dtype]
        both = 2 * _BYTES[self.dtype]
        return Traffic(
            params=read,
            guard=0 if self.on_nonfinite == "propagate" else read,
            average=both,
            remainder=both if self.compensated else 0,
        )

    @property
    def update_bytes(self) -> int:
        """Bytes that an update reads and writes on a rank, in all its memories."""
        return self.params_per_rank * self.traffic.total

    @property
    def host_link_bytes(self) -> int:
        """Bytes that an update sends from the accelerator to the host: the params, if offloaded."""
        return self.params_per_rank * self.traffic.params if self.offload else 0

    @property
    def host_memory_bytes(self) -> int:
        """Bytes that an update of an offloaded average reads and writes in host memory.

        The params arrive there and are read; average and remainder are read and written.
        """
        traffic = self.traffic
        per_param = 2 * traffic.params + traffic.average + traffic.remainder
        return self.params_per_rank * per_param if self.offload else 0

    @property
    def update_seconds(self) -> float:
        """From the beginning of an update to its end.

        Offloaded, chunks are read, sent and averaged one behind the other, so that the slowest of
        the three decides.
        """
        if not self.offload:
            return self.update_overhead + self.update_bytes / self.memory_bandwidth
        device_bytes = self.params_per_rank * (self.traffic.params + self.traffic.guard)
        return self.update_overhead + max(
            device_bytes / self.memory_bandwidth,
            self.host_link_bytes / self.host_link_bandwidth,
            self.host_memory_bytes / self.host_memory_bandwidth,
        )

    @property
    def exposed_seconds(self) -> float:
        """Seconds that training waits for an update.

        All of it; or offloaded, where the length of a step is known, what does not fit into the
        one step until the optimizer writes again.
        """
        if self.offload and self.step_seconds is not None:
            return max(0.0, self.update_seconds - self.step_seconds)
        return self.update_seconds

    @property
    def hidden(self) -> bool:
        """Whether updates are done behind the training step and it never waits for one."""
        return self.exposed_seconds == 0.0

    @property
    def amortized_seconds(self) -> float:
        """Seconds that the average adds to a step: ``exposed_seconds / update_every``."""
        return self.exposed_seconds / self.update_every

    @property
    def communication_bytes(self) -> int:
        """Between ranks, in an update and a swap: each rank averages what it holds.

        The guard has the ranks of a sharded model agree, by one number.
        """
        guarded = self.on_nonfinite != "propagate" and self.sharded and self.ranks > 1
        return 4 if guarded else 0

    @property
    def swap_bytes(self) -> int:
        """Bytes that a swap in and back reads and writes in the memory of the params.

        Where dtype and place are the same the two are exchanged, twice, in chunks that stay in the
        cache. Otherwise the live weights are kept aside: they are copied there, the average is
        copied over them, and they are copied back.
        """
        average, live = _BYTES[self.dtype], _BYTES[self.param_dtype]
        if self._exchanged:
            return self.params_per_rank * 4 * (average + live)
        from_device = 0 if self.offload else average
        return self.params_per_rank * (5 * live + from_device)

    @property
    def swap_extra_bytes(self) -> int:
        """Bytes of the live weights that are kept aside during a swap."""
        return 0 if self._exchanged else self.params_per_rank * _BYTES[self.param_dtype]

    @property
    def swap_seconds(self) -> float:
        """Seconds of a swap in and back; an offloaded average comes over the link in the params' dtype."""
        link = self.params_per_rank * _BYTES[self.param_dtype] if self.offload else 0
        return self.swap_bytes / self.memory_bandwidth + link / self.host_link_bandwidth

    @property
    def file_bytes(self) -> int:
        """Bytes of average and remainder in a checkpoint, without its header."""
        return self.params * _BYTES[self.dtype] * (2 if self.compensated else 1)

    @property
    def save_seconds(self) -> float:
        """Seconds of a checkpoint to which every rank writes its shards; replicated, one rank writes."""
        return (self.average_bytes + self.remainder_bytes) / self.disk_bandwidth

    @property
    def gather_bytes(self) -> int:
        """Bytes that one rank receives to write everything in one file."""
        return self.file_bytes - (self.average_bytes + self.remainder_bytes)

    @property
    def gather_seconds(self) -> float:
        """Seconds to receive ``gather_bytes`` over the network."""
        return self.gather_bytes / self.network_bandwidth

    @property
    def one_file_seconds(self) -> float:
        """Seconds to gather tensor by tensor on one rank and then write one file."""
        return self.gather_seconds + self.file_bytes / self.disk_bandwidth

    @property
    def _exchanged(self) -> bool:
        return self.dtype == self.param_dtype and not self.offload

    def __str__(self) -> str:
        return table(self)


def plan_ema(
    params: float,
    ranks: int = 1,
    *,
    dtype: str = "float32",
    param_dtype: str = "bfloat16",
    compensated: bool = False,
    on_nonfinite: OnNonfinite = "propagate",
    update_every: int = 1,
    sharded: bool = True,
    offload: bool = False,
    memory_bandwidth: float = 3.35e12,
    host_link_bandwidth: float = 64e9,
    host_memory_bandwidth: float = 75e9,
    network_bandwidth: float = 50e9,
    disk_bandwidth: float = 1e9,
    update_overhead: float = 0.0,
    step_seconds: float | None = None,
) -> Plan:
    """The costs of an average of ``params`` parameters on ``ranks`` ranks.

    Bandwidths are bytes a second, read and written together, of one rank: ranks that share a memory
    or a disk have a part of it each. Their defaults are what vendors give for an H100 with PCIe 5,
    an eighth of the memory of its host and a 400 Gb/s network; none was measured.

    Args:
        params: parameters that are averaged.
        ranks: processes over which the params are sharded, or that each hold them all.
        dtype: of the average: float32, float64, or bfloat16 with stochastic rounding.
        param_dtype: of the live weights, also float16.
        compensated: a remainder is kept beside the average.
        on_nonfinite: ``"skip"`` and ``"raise"`` read the params once more.
        update_every: steps from one update to the next.
        sharded: False: each rank holds all params and their average, as in DDP.
        offload: the average lies in host memory.
        memory_bandwidth: of the memory in which the params lie.
        host_link_bandwidth: from the accelerator to the host, one way.
        host_memory_bandwidth: a rank's part of it.
        network_bandwidth: into one rank.
        disk_bandwidth: of one rank.
        update_overhead: seconds that an update takes besides: checks, kernel launches.
        step_seconds: length of a training step, where it is known.

    Raises:
        ArgumentError: an argument is out of range, or a bfloat16 average is to be compensated.
        ArgumentTypeError: an argument has the wrong type.

    >>> plan = plan_ema(70e9, 512)
    >>> plan.average_bytes, plan.traffic.total
    (546875000, 10)
    """
    plan = Plan(
        params=_whole("params", params),
        ranks=validate.integer("ranks", ranks, minimum=1),
        dtype=_dtype("dtype", dtype, _AVERAGES),
        param_dtype=_dtype("param_dtype", param_dtype, tuple(_BYTES)),
        compensated=_flag("compensated", compensated),
        on_nonfinite=on_nonfinite,
        update_every=validate.integer("update_every", update_every, minimum=1),
        sharded=_flag("sharded", sharded),
        offload=_flag("offload", offload),
        memory_bandwidth=validate.positive("memory_bandwidth", memory_bandwidth),
        host_link_bandwidth=validate.positive("host_link_bandwidth", host_link_bandwidth),
        host_memory_bandwidth=validate.positive("host_memory_bandwidth", host_memory_bandwidth),
        network_bandwidth=validate.positive("network_bandwidth", network_bandwidth),
        disk_bandwidth=validate.positive("disk_bandwidth", disk_bandwidth),
        update_overhead=validate.non_negative("update_overhead", update_overhead),
        step_seconds=(
            None if step_seconds is None else validate.positive("step_seconds", step_seconds)
        ),
    )
    if plan.on_nonfinite not in get_args(OnNonfinite):
        raise ArgumentError(
            f"`on_nonfinite` must be 'propagate', 'skip' or 'raise', got {on_nonfinite!r}"
        )
    if plan.compensated and plan.dtype == "bfloat16":
        raise ArgumentError(
            "`compensated` must be False where `dtype` is bfloat16, got True: stochastic rounding is"
            " what keeps such an average moving"
        )
    return plan


def _whole(name: str, value: object) -> int:
    """A whole number of at least 1; 70e9 is one."""
    number = validate.real(name, value)
    if not (number >= 1.0 and number.is_integer()):
        raise ArgumentError(f"`{name}` must be a whole number of at least 1, got {number:g}")
    return int(number)


def _dtype(name: str, value: object, allowed: tuple[str, ...]) -> str:
    chosen = _ALIASES.get(value, value) if isinstance(value, str) else value
    if chosen not in allowed:
        raise ArgumentError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}")
    return str(chosen)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"`{name}` must be a bool, got {value!r}")
    return value
