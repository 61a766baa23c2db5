"""The contents of a header, with the checks of a reader; a writer makes them before it publishes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ema.checkpoint.container import TensorInfo
from ema.checkpoint.digests import check_header, read_digests
from ema.checkpoint.record import Record, names_from_json, record_from
from ema.errors import CheckpointError, listing

__all__ = ["Contents", "check_contents"]


class Contents(NamedTuple):
    """The metadata about the tensors.

    Attributes:
        record: how far the average is and how it was made.
        digests: name to the digest of a tensor's bytes.
        pairs: names of those that are pairs of reals, complex128.
    """

    record: Record
    digests: dict[str, str]
    pairs: tuple[str, ...]


def check_contents(metadata: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> Contents:
    """Read the metadata of a state and compare it with its tensors.

    Raises:
        CheckpointError: it is of a newer version, damaged, or says what cannot be.
    """
    record = record_from(metadata)  # a newer version first: it may seal its header differently
    check_header(metadata, infos)
    digests = read_digests(metadata, infos)
    pairs = names_from_json("complex128", metadata.get("complex128", "[]"))
    for name in pairs:
        if name not in infos or infos[name].dtype != "F64" or infos[name].shape[-1:] != (2,):
            raise CheckpointError(
                f"`complex128` names {name!r:.80}, which is not stored as pairs of F64"
            )
    if absent := [key for key in record.parts if key not in infos]:
        raise CheckpointError(f"`parts` names tensors that are not there: {listing(absent)}")
    averaged = {record.parts[key][2] if key in record.parts else key for key in infos}
    if both := sorted(averaged.intersection(record.not_averaged)):
        raise CheckpointError(f"{listing(both)} are averaged and not averaged")
    return Contents(record, digests, pairs)
