"""Check what a file says about its tensors.

The reader does so when it opens a file. The writer does so before it replaces one, so that the reader
accepts every file that was written.
"""

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
        record: the facts about the average.
        digests: the digest of each tensor's bytes, by name.
        pairs: names of complex128 tensors, which are stored as pairs of float64.
    """

    record: Record
    digests: dict[str, str]
    pairs: tuple[str, ...]


def check_contents(metadata: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> Contents:
    """Read the metadata of a state and compare it with the tensors.

    Raises:
        CheckpointError: the metadata has another version, is damaged, or contradicts the tensors.
    """
    record = record_from(
        metadata
    )  # checks the version first: a newer one may seal its header differently
    check_header(metadata, infos)
    digests = read_digests(metadata, infos)
    pairs = names_from_json("complex128", metadata.get("complex128", "[]"))
    for name in pairs:
        if name not in infos or infos[name].dtype != "F64" or infos[name].shape[-1:] != (2,):
            raise CheckpointError(
                f"`complex128` names {name!r:.80}, which is not stored as pairs of F64"
            )
    if absent := [key for key in record.parts if key not in infos]:
        raise CheckpointError(f"`parts` names tensors that the file lacks: {listing(absent)}")
    averaged = {record.parts[key][2] if key in record.parts else key for key in infos}
    if both := sorted(averaged.intersection(record.not_averaged)):
        raise CheckpointError(
            f"`not_averaged` names tensors that the file averages: {listing(both)}"
        )
    return Contents(record, digests, pairs)
