"""Compare digests of the averages that several ranks should hold alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from ema.errors import StateError, listing
from ema.torch_backend.tensors.memory import CHUNK, flat, is_dense, row_major
from ema.torch_backend.tensors.sharding import box_of, is_sharded

__all__ = ["verify_ranks"]


def verify_ranks(
    counters: Mapping[str, int], averages: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Compare tensors that several ranks hold: all ranks, or the replicas of a mesh.

    Each rank sends a digest for every way in which its tensors are sharded, and names are only sent
    where these differ.

    Args:
        counters: are the same on every rank.
        averages: by name the average here and the live tensor that it belongs to.

    Raises:
        StateError: on every rank; it lists the differences, and the ranks that differ from most.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    groups = _groups(counters, averages)
    # the places of the tensors in a group, and their values: two digests for each way of sharding
    ours = {_digest_of(group): _digest_of(group.values()) for group in groups}
    everyone = _by_key(_everyone(ours))
    different = {key for key, values in everyone.items() if len(set(values.values())) > 1}
    if not different:
        return
    details = {}
    for group in groups:
        if _digest_of(group) in different:
            details.update(group)
    found: dict[str, set[int]] = defaultdict(set)
    for (name, _), values in _by_key(_everyone(details)).items():
        found[name] |= _outside_of_most(values)
    odd = {name: sorted(ranks) for name, ranks in found.items() if ranks}
    ranks = sorted(set().union(*odd.values()))
    raise StateError(
        f"the averages differ between ranks: {listing(odd)} on {_spoken(ranks)},"
        " against most of those that should hold the same"
    )


def _groups(
    counters: Mapping[str, int], averages: Mapping[str, tuple[Tensor, Tensor]]
) -> list[dict[tuple[str, str], bytes]]:
    """A digest of each counter and tensor by its name and box, in groups that are sharded alike."""
    everywhere = {(name, ""): str(value).encode() for name, value in counters.items()}
    groups = {"everywhere": everywhere}
    for name, (average, live) in averages.items():
        group = groups.setdefault(_placement(live), {})
        group[name, repr(box_of(live))] = _digest(average)
    return list(groups.values())


def _placement(live: Any) -> str:
    """How it is sharded; ranks need not agree on the text, only one rank with itself."""
    if not is_sharded(live):
        return "everywhere"
    return f"{live.device_mesh.mesh.tolist()} {live.placements}"


def _digest(tensor: Tensor) -> bytes:
    """The digest of the bytes of a tensor, computed a chunk at a time."""
    state = xxhash.xxh3_128()
    memory = flat(tensor) if is_dense(tensor) else row_major(tensor)
    for chunk in torch.split(memory, CHUNK):
        data: Any = chunk.cpu().view(torch.uint8).numpy()
        state.update(data)
    return state.digest()


def _digest_of(parts: Iterable[Any]) -> bytes:
    return xxhash.xxh3_128_digest(repr(list(parts)).encode())


def _everyone(ours: Mapping[Any, bytes]) -> list[Mapping[Any, bytes]]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, ours)
    return everyone


def _by_key(everyone: Iterable[Mapping[Any, bytes]]) -> dict[Any, dict[int, bytes]]:
    """For each key the value of each rank."""
    values: dict[Any, dict[int, bytes]] = defaultdict(dict)
    for rank, theirs in enumerate(everyone):
        for key, value in theirs.items():
            values[key][rank] = value
    return values


def _outside_of_most(values: Mapping[int, bytes]) -> set[int]:
    """The ranks whose value is not the most frequent one; of two the later rank."""
    counts: dict[bytes, int] = defaultdict(int)
    for value in values.values():
        counts[value] += 1
    most = max(counts, key=lambda value: counts[value])
    return {rank for rank, value in values.items() if value != most}


def _spoken(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
