"""Changes that need no model: removing, merging, going back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..documents import describe
from ..errors import ConfigError, DatastoreCorrupt, DatastoreError, DatastoreMismatch
from ..progress import progress
from ..text import count
from ._codec import open_codec
from ._manifest import Manifest
from ._part import CODEC_FILE, Part
from ._segment import Segment
from ._stored import Directory, Place, canonical, with_deleted
from ._verify import wrong
from ._writing import segment_used, write_segment, writing

_COPIED_TOGETHER = 1 << 14  # keys, however long a document is


def remove_documents(
    path: Path, ids: Iterable[str], pattern: str | None, where: Mapping[str, Any], *, dry_run: bool
) -> list[str]:
    """Delete documents in one commit; see `Directory.chosen`. Nothing is published where none is chosen.

    Returns:
        Ids of the documents.
    """
    if dry_run:
        directory = Directory.open(path, Manifest.load(path))
        return [directory.document(place)["id"] for place in directory.chosen(ids, pattern, where)]
    with writing(path, "remove") as manifest:
        directory = Directory.open(path, manifest)
        places = directory.chosen(ids, pattern, where)
        names = [directory.document(place)["id"] for place in places]
        if places:
            segments = with_deleted(manifest, directory, places)
            manifest.following(f"remove {count(len(places), 'document')}", segments=segments).publish(path)
        return names


def merge_documents(
    path: Path, other: Path, *, replace_others: bool, segment_entries: int, show_progress: bool
) -> tuple[int, int]:
    """Copy the documents of another datastore, with their keys; what is stored already is left out.

    Returns:
        How many documents were added, and how many of them replaced others.

    Raises:
        DatastoreError: An id is stored with other content, and `replace_others` is false; or the other is damaged.
        DatastoreMismatch: The keys are not of one kind.
    """
    theirs = Manifest.load(other)
    _check_alike(Manifest.load(path), theirs)  # before the lock, which writes
    source = Directory.open(other, theirs, verify=True)
    for problem in wrong(source, theirs):
        raise DatastoreCorrupt(problem)  # it would get a checksum of ours
    added = replaced = 0
    with writing(path, "merge") as manifest, progress("copying", theirs.entries, show=show_progress) as advance:
        _check_alike(manifest, theirs)
        codec = None if theirs.codec is not None else open_codec(path, manifest)
        encode = None if codec is None else codec.encode
        directory = Directory.open(path, manifest)
        for group in by_size(source, _new(source, directory, replace_others=replace_others), segment_entries):
            part = copy_documents(path, manifest, source, group, advance, encode)
            places = [directory.with_id(source.document(place)["id"]) for place in group]
            others = [place for place in places if place is not None]
            change = f"merge {count(len(group), 'document')} of {describe(other.name)}"
            segments = (*with_deleted(manifest, directory, others), part)
            manifest = manifest.following(change, segments=segments, kept=segment_used(manifest))
            manifest.publish(path)
            added, replaced = added + len(group), replaced + len(others)
    return added, replaced


def rollback_to(path: str | Path, version: int) -> None:
    """Publish what an earlier version held as a new version; the current one may be damaged.

    Args:
        path: The datastore's folder.
        version: That is still kept.

    Raises:
        ConfigError: That version is not kept.
        DatastoreError: Files of it are missing or have another size; or another process writes.
    """
    path = Path(path)
    with writing(path, f"rollback to version {version}") as manifest:
        kept = list(manifest.history(path))
        for old in kept:
            if old.version == version:
                old.check_files(path)
                fields = {"segments": old.segments, "index": old.index, "corpus": old.corpus}
                manifest.following(f"rollback to version {version}", **fields).publish(path)
                return
        raise ConfigError(
            f"version is {version}; expected one that is kept: {kept[-1].version} to {kept[0].version}. A compaction "
            "drops those before it"
        )


def by_size(directory: Directory, places: Iterable[Place], entries: int) -> Iterator[list[Place]]:
    """Gather documents until a segment is full; none is divided."""
    group: list[Place] = []
    size = 0
    for place in places:
        rows = directory.segments[place.segment].rows(place.number)
        length = rows.stop - rows.start
        if group and size + length > entries:
            yield group
            group, size = [], 0
        group.append(place)
        size += length
    if group:
        yield group


def copy_documents(
    path: Path,
    manifest: Manifest,
    source: Directory,
    places: list[Place],
    advance: Any,
    encode: Callable[[Tensor], Tensor] | None = None,
    counts: Sequence[npt.NDArray[np.uint32]] | None = None,
) -> Part:
    """Write a segment with copies of stored documents.

    Args:
        path: The datastore's folder, held for writing.
        manifest: The version to which the segment will be added.
        source: Where the documents are.
        places: Which of them.
        advance: Called with the number of entries copied.
        encode: Makes stored keys of the new kind of those that are there; None copies them as they are.
        counts: Of each of the source's segments, how many entries each of its entries shall stand for; see
            `Segment.stored`.
    """
    left = [None if counts is None else counts[place.segment] for place in places]
    stored = [
        source.segments[place.segment].stored(place.number, some) for place, some in zip(places, left, strict=True)
    ]

    def keys() -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for place, some in zip(places, left, strict=True):
            segment: Segment = source.segments[place.segment]
            rows = segment.rows(place.number)
            for first in range(rows.start, rows.stop, _COPIED_TOGETHER):
                part = slice(first, min(first + _COPIED_TOGETHER, rows.stop))
                block = segment.keys[part] if some is None else segment.keys[part][torch.from_numpy(some[part] > 0)]
                yield torch.arange(start, start + len(block)), block if encode is None else encode(block)
                start += len(block)
                advance(part.stop - part.start)

    return write_segment(path, manifest, stored, keys())


def _new(source: Directory, directory: Directory, *, replace_others: bool) -> Iterator[Place]:
    """Yield the documents that a datastore does not hold."""
    for place in source:
        document = source.document(place)
        here = directory.with_id(document["id"])
        if here is None:
            yield place
            continue
        known = directory.document(here)
        same = known["sha256"] == document["sha256"]
        if same and canonical(known["metadata"]) == canonical(document["metadata"]):
            continue
        if not replace_others:
            raise DatastoreError(
                f"{document['id']!r} is stored already, with other content; replace it, or remove one of the two"
            )
        yield place


def _check_alike(one: Manifest, other: Manifest) -> None:
    """Raise DatastoreMismatch unless the other's keys can lie in the one: as they are, or encoded with its codec."""
    one.check_bound({"encoder": other.encoder, "tokenizer": other.tokenizer})
    for name, mine, theirs in (
        ("metric", one.metric, other.metric),
        ("keys", one.encoder_keys, other.encoder_keys),
    ):
        if mine != theirs:
            raise DatastoreMismatch(
                f"the datastores have the {name} {mine} and {theirs}; build one of them again, like the other"
            )
    if other.codec is not None and (one.codec is None or one.codec.files != other.codec.files):
        mine = "not compressed" if one.codec is None else f"compressed by {one.codec.files[CODEC_FILE]['sha256'][:12]}"
        raise DatastoreMismatch(
            f"the keys to merge are compressed by the codec {other.codec.files[CODEC_FILE]['sha256'][:12]}, those here "
            f"are {mine}; merge first and compress then, or build the other again"
        )
