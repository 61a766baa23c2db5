"""Write and read ``ema.safetensors``, one leaf at a time; ``ema.checkpoint`` has the format."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ema import validate
from ema.checkpoint import (
    MAX_SHARD_SIZE,
    Record,
    Source,
    StoredTensor,
    read_state,
    write_state,
)
from ema.checkpoint.paths import errors_of
from ema.checkpoint.remainders import joined, separated
from ema.checkpoint.renaming import Rename, Transform, check_transform, renamed, transformed
from ema.errors import ArgumentError, CheckpointError, difference, listing, warn
from ema.jax_backend.access import choose_states
from ema.jax_backend.saving.gather import Whole, is_everywhere, is_here, on_first_process
from ema.jax_backend.state import ParamsEMAState
from ema.jax_backend.trees import Flat, is_hole, plain
from ema.schedules import Schedule, as_schedule

__all__ = ["load_params_ema", "save_params_ema", "source_of"]

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "C128": np.dtype(np.complex128),
    "C64": np.dtype(np.complex64),
}
"""The dtypes of averages."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST = np.iinfo(np.int32).max  # the counters of a state go no further


def save_params_ema(
    path: str | os.PathLike[str],
    opt_state: optax.OptState,
    name: str | None = None,
    *,
    decay: float | Schedule | None = None,
    update_after_step: int | None = None,
    update_every: int | None = None,
    seed: int | None = None,
    metadata: Mapping[str, str] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Path:
    """Write an average as ``ema.safetensors``.

    The write is atomic: if the process is killed, the previous file survives. The tensors have the
    names of the leaves of the params, with dots (``layers.0.kernel``). The remainders of a
    compensated average are called ``remainder/layers.0.kernel``. :meth:`ema.EMAModel.load` reads
    the same file.

    If the state is spread over several processes (``jax.distributed``), process 0 gathers the
    arrays one at a time and writes the file: every process must call this function.

    Args:
        path: a file that ends in ``.safetensors``, or a folder, which is created if necessary.
        opt_state: the optimizer's state, or anything that contains it.
        name: which average, if there are several: one file each.
        decay: the ``decay`` of ``params_ema``, to record it in the file; the state lacks it.
        update_after_step: likewise.
        update_every: likewise.
        seed: likewise.
        metadata: notes of your own, a mapping from strings to strings.
        max_shard_size: bytes in one file; a larger state is split.

    Returns:
        The file, completely written.

    Raises:
        ArgumentError: the state lacks an average called ``name``, or has several and ``name`` is
            None; or the state is abstract or traced; or its members (``jax.vmap``, ``jax.pmap``)
            have different steps.
        CheckpointError: the file cannot be written, with the reason; in every process.
        ModelError: the processes hold different states.

    Example:
        >>> import tempfile
        >>> from ema.jax_backend import params_ema
        >>> tx = params_ema(decay=0.9)
        >>> opt_state = tx.init({"w": jnp.ones(2)})
        >>> file = save_params_ema(tempfile.mkdtemp(), opt_state, decay=0.9)
        >>> load_params_ema(file, opt_state).params_ema
        {'w': Array([1., 1.], dtype=float32)}
    """
    states, label = choose_states(opt_state, name)
    leaves, holes = _leaves([state.averages()[label] for state in states])
    remainders, _ = _leaves([state.remainders()[label] for state in states])
    numbers = {
        (
            _number(s.step),
            _number(s.count),
            None if _is_absent(s.skipped) else _number(s.skipped),
        )
        for s in map(plain, states)
    }
    if len(numbers) > 1:
        steps, counts, skips = (sorted({str(n[i]) for n in numbers}) for i in range(3))
        raise ArgumentError(
            f"`opt_state` holds {len(states)} groups of one average at different steps:"
            f" [{', '.join(steps)}], [{', '.join(counts)}] updates, [{', '.join(skips)}] skipped"
        )
    step, count, skipped = numbers.pop()
    with errors_of(path, "written"):
        tensors, parts = joined(leaves, remainders)
        record = Record(
            step=step,
            count=count,
            schedule=None if decay is None else as_schedule(decay),
            update_after_step=_optional("update_after_step", update_after_step, 0, 63),
            update_every=_optional("update_every", update_every, 1, 63),
            not_averaged=tuple(holes),
            skipped=skipped,
            seed=_optional("seed", seed, 0, 64),
            parts=parts,
            extra={} if metadata is None else metadata,
        )

    def write(whole: Whole) -> Path:
        with errors_of(path, "written"):
            sources = {key: source_of(key, leaf, whole) for key, leaf in tensors.items()}
        return write_state(path, record, sources, max_shard_size=max_shard_size)

    return on_first_process(list(tensors.values()), write)


def load_params_ema(
    path: str | os.PathLike[str],
    opt_state: optax.OptState,
    name: str | None = None,
    *,
    rename: Rename = None,
    transform: Transform = None,
) -> Any:
    """Replace step, count and average of an optimizer's state by those of a file.

    The file may come from JAX or PyTorch. The rest of the state stays. The average has the
    structure, dtypes and sharding that it has in ``opt_state``, and every process reads its own
    part; the schedule is that of ``params_ema``. If the average is compensated and the file has no
    remainder, the remainder starts at 0.

    Args:
        path: the file, or the folder with ``ema.safetensors`` in it.
        opt_state: the optimizer's state, or anything that contains it.
        name: which average to replace, if there are several.
        rename: a function or table from a tensor's name in the file to the name of the leaf
            (``layers.0.kernel``), or to None to leave the tensor out.
        transform: ``transform(name, array)``, or a table from the leaf's name to a function of the
            NumPy array, for layouts that differ. It is called more than once.

    Returns:
        A new state of the same structure.

    Raises:
        ArgumentError: the state lacks an average called ``name``, or has several and ``name`` is
            None; ``rename`` gives two tensors one name, or has a name the file lacks; or
            ``transform`` has a name that no tensor gets.
        CheckpointError: the file cannot be read, is damaged or of a newer version, or belongs to
            other params: then it lists each leaf that is missing, unexpected or of another shape.

    Warns:
        EMAWarning: the file has a remainder, but the average in ``opt_state`` is not compensated.
    """
    states, label = choose_states(opt_state, name)
    leaves, _ = _leaves([state.averages()[label] for state in states])
    kept, _ = _leaves([state.remainders()[label] for state in states])
    stored = read_state(path)
    with errors_of(stored.place, "read"):
        found, lost = separated(stored)
    names = renamed([*found, *stored.record.not_averaged], rename)
    check_transform(transform, names)
    tensors = {new: found[old] for new, old in names.items() if old in found}
    remainders = {new: lost[old] for new, old in names.items() if old in lost}
    with errors_of(stored.place, "read"):
        _check(tensors, remainders, leaves, transform)
    if dropped := [key for key in remainders if key not in kept]:
        warn(
            f"{stored.place}: the file has the remainder of a compensated average, but this average"
            f" is not compensated: the remainder of {listing(dropped)} is lost"
        )

    def fill(tree: Any, tensors: Mapping[str, StoredTensor]) -> Any:
        flat = Flat.of(tree)
        return flat.fill(
            _read(old, key, tensors.get(key), transform)
            for key, old in flat.items()
            if not is_hole(old)
        )

    def replace(node: Any) -> Any:
        if not isinstance(node, ParamsEMAState) or label not in node.averages():
            return node
        average = fill(node.averages()[label], tensors)
        remainder = fill(node.remainders()[label], remainders)
        if len(node.name) > 1:
            average = {**node.params_ema, label: average}
            remainder = {**node.remainder, label: remainder} if node.remainder else ()
        skipped = node.skipped
        return node._replace(
            step=_counter(node.step, stored.record.step),
            count=_counter(node.count, stored.record.count),
            params_ema=average,
            remainder=remainder,
            skipped=() if _is_absent(skipped) else _counter(skipped, stored.record.skipped or 0),
        )

    return jax.tree.map(replace, opt_state, is_leaf=lambda node: isinstance(node, ParamsEMAState))


def _number(counter: Any) -> int:
    """A counter as an integer; all members of a vmapped optimizer must have the same one."""
    if isinstance(counter, jax.core.Tracer | jax.ShapeDtypeStruct):
        raise ArgumentError(
            "`opt_state` must hold a number for each of its counters, got"
            f" {counter!r:.80}: save it outside of jax.jit"
        )
    counters = np.unique(np.asarray(counter))
    if counters.size != 1:
        raise ArgumentError(
            "`opt_state` must hold one number for each of its counters, got"
            f" {listing(map(str, counters))} for its members: save each member by itself,"
            " jax.tree.map(lambda leaf: leaf[i], opt_state)"
        )
    return int(counters[0])


def _is_absent(field: Any) -> bool:
    """Whether a field of a state is empty because its options do not use it."""
    return isinstance(field, tuple)


def _leaves(trees: list[Any]) -> tuple[dict[str, Any], list[str]]:
    """The averaged leaves of all groups by name, and the names that no group averages."""
    leaves: dict[str, Any] = {}
    holes: dict[str, None] = {}
    for tree in trees:
        for key, value in Flat.of(plain(tree)).items():
            if value is None:
                continue
            if is_hole(value):
                holes[key] = None
            elif key in leaves:
                raise ArgumentError(f"`opt_state` has two averages with the name `{key}`")
            else:
                leaves[key] = value
    # a mask may stand for a whole subtree, and another group may average a part of that
    return leaves, [
        hole
        for hole in holes
        if not any(key == hole or key.startswith(f"{hole}.") or not hole for key in leaves)
    ]


def _check(
    tensors: Mapping[str, StoredTensor],
    remainders: Mapping[str, StoredTensor],
    leaves: Mapping[str, Any],
    transform: Transform,
) -> None:
    both = [*tensors.items(), *remainders.items()]
    if odd := [name for name, tensor in both if tensor.dtype not in DTYPES]:
        raise CheckpointError(f"these cannot be averages, because of their dtype: {listing(odd)}")
    mismatched = []
    for name, tensor in both:
        if name not in leaves:
            continue
        value = transformed(name, _array(tensor), transform)
        leaf = leaves[name]
        if np.shape(value) != np.shape(leaf):
            mismatched.append(
                f"`{name}` has shape {np.shape(leaf)}, the file has {np.shape(value)}"
            )
        elif (jnp.dtype(leaf.dtype).kind == "c") != (jnp.dtype(value.dtype).kind == "c"):
            mismatched.append(f"`{name}` has dtype {leaf.dtype}, the file has {value.dtype}")
    missing = [name for name in leaves if name not in tensors]
    unexpected = [name for name in tensors if name not in leaves]
    if text := difference(missing, unexpected, mismatched):
        raise CheckpointError(f"the state belongs to other params: {text}")


def _array(tensor: StoredTensor) -> np.ndarray[Any, Any]:
    """The tensor as a view of the file."""
    return np.frombuffer(tensor.bytes(), DTYPES[tensor.dtype]).reshape(tensor.shape)


def _read(old: Any, key: str, tensor: StoredTensor | None, transform: Transform) -> Any:
    """A copy of a tensor of the file, or zeros, that replaces the leaf ``old``."""
    leaf = jax.tree.leaves(old)[0]  # the array in an nnx Variable
    if tensor is None:
        return _like(old, np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape))
    return _like(old, transformed(key, _array(tensor), transform))


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """Memory that JAX on the CPU can adopt without a copy: its address is a multiple of 64."""
    size = np.dtype(dtype).itemsize * math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array: np.ndarray[Any, Any] = memory[start : start + size].view(dtype).reshape(shape)
    return array


def _like(old: Any, value: np.ndarray[Any, Any]) -> Any:
    """An array with the elements of ``value`` and the dtype, sharding and Variable of ``old``.

    ``value`` may be a view of a file; its elements are copied.
    """

    def put(leaf: Any) -> Any:
        def own(index: Any = ...) -> np.ndarray[Any, Any]:
            part = value[index]
            memory = _aligned(part.shape, leaf.dtype)  # JAX may adopt this memory
            np.copyto(memory, part, casting="unsafe")
            return memory

        if isinstance(leaf, np.ndarray):
            return own()
        sharding = _sharding_of(leaf)
        if sharding is None or sharding.is_fully_addressable:
            array = jax.device_put(own(), sharding)
        else:  # device_put would compare the value with the other processes
            array = jax.make_array_from_callback(leaf.shape, sharding, own)
        return array.block_until_ready()  # so that copies do not pile up in a queue

    return jax.tree.map(put, old)


def _sharding_of(leaf: Any) -> jax.sharding.Sharding | None:
    """The sharding that a user chose for an array, or for a ``jax.ShapeDtypeStruct``; or None."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    sharding: jax.sharding.Sharding | None = getattr(leaf, "sharding", None)
    abstract = isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh)
    return None if abstract else sharding


def _counter(old: Any, value: int) -> Any:
    number = np.array(min(value, _LARGEST), np.int32)
    return _like(old, np.broadcast_to(number, np.shape(jax.tree.leaves(old)[0])))


def source_of(name: str, leaf: Any, whole: Whole | None = None) -> Source:
    """A leaf as a source for the writer.

    Args:
        name: the name of the leaf, for the error.
        leaf: an array.
        whole: a function that gathers the leaf, if the other processes take part.

    Raises:
        CheckpointError: the format does not have its dtype, or another process holds a part of it.
    """
    dtype = jnp.dtype(leaf.dtype)
    if dtype not in _NAMES or not isinstance(leaf, jax.Array | np.ndarray):
        raise CheckpointError(f"`{name}` is {leaf!r:.80}, which the format cannot hold")
    if not is_here(leaf):
        if whole is None:
            raise CheckpointError(f"`{name}` has a part in another process: gather it first")
        if not is_everywhere(leaf):
            raise CheckpointError(
                f"`{name}` has parts in some processes and none in others: gather it first"
            )
    read: Callable[[], Any] = partial(_bytes_of, leaf, whole)
    return Source(_NAMES[dtype], tuple(leaf.shape), read)


def _bytes_of(leaf: Any, whole: Whole | None) -> Any:
    if whole is not None:
        leaf = whole(leaf)
    if isinstance(leaf, jax.Array) and not (
        len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu"
    ):
        leaf = leaf.copy()  # an array keeps its copy on the host as long as it lives
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def _optional(name: str, value: int | None, minimum: int, bits: int) -> int | None:
    return None if value is None else validate.integer(name, value, minimum, bits)
