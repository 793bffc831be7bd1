"""Changes that need no model: removing, merging, going back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DatastoreError, DatastoreMismatch
from ..progress import progress
from ..text import count
from ._manifest import Manifest
from ._segment import Segment
from ._stored import Directory, Place, with_deleted
from ._writing import segment_used, write_segment, writing


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
        DatastoreError: An id is stored with other content, and `replace_others` is false.
        DatastoreMismatch: The keys are not of one kind.
    """
    theirs = Manifest.load(other)
    source = Directory.open(other, theirs)
    added = replaced = 0
    _check_alike(Manifest.load(path), theirs)
    with writing(path, "merge") as manifest, progress("copying", theirs.entries, show=show_progress) as advance:
        directory = Directory.open(path, manifest)
        for group in by_size(source, _new(source, directory, replace_others=replace_others), segment_entries):
            part = copy_documents(path, manifest, source, group, advance)
            places = [directory.with_id(source.document(place)["id"]) for place in group]
            others = [place for place in places if place is not None]
            change = f"merge {count(len(group), 'document')} of {other.name}"
            segments = (*with_deleted(manifest, directory, others), part)
            manifest = manifest.following(change, segments=segments, kept=segment_used(manifest))
            manifest.publish(path)
            added, replaced = added + len(group), replaced + len(others)
    return added, replaced


def rollback_to(path: Path, version: int) -> None:
    """Publish what an earlier version held as a new version.

    Raises:
        ConfigError: That version is not kept.
    """
    with writing(path, f"rollback to version {version}") as manifest:
        kept = list(manifest.history(path))
        for old in kept:
            if old.version == version:
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


def copy_documents(path: Path, manifest: Manifest, source: Directory, places: list[Place], advance: Any) -> Any:
    """Write a segment with copies of stored documents."""
    stored = [source.segments[place.segment].stored(place.number) for place in places]

    def keys() -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for place in places:
            segment: Segment = source.segments[place.segment]
            block = segment.keys[segment.rows(place.number)]
            yield torch.arange(start, start + len(block)), block
            start += len(block)
            advance(len(block))

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
        if (known["sha256"], str(known["metadata"])) == (document["sha256"], str(document["metadata"])):
            continue
        if not replace_others:
            raise DatastoreError(
                f"{document['id']!r} is stored already, with other content; replace it, or remove one of the two"
            )
        yield place


def _check_alike(one: Manifest, other: Manifest) -> None:
    """Raise DatastoreMismatch unless the keys of two datastores can lie in one."""
    one.check_bound({"encoder": other.encoder, "tokenizer": other.tokenizer})
    for name in ("metric", "keys"):
        if getattr(one, name) != getattr(other, name):
            raise DatastoreMismatch(
                f"the datastores have the {name} {getattr(one, name)} and {getattr(other, name)}; build one of them "
                "again, like the other"
            )
