"""Compaction: everything deleted leaves the disk, small segments become large ones, one index covers all entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..progress import progress
from ._change import by_size, copy_documents
from ._manifest import Manifest
from ._part import Part
from ._stored import Directory, names
from ._writing import segment_used, sweep, writing


def compact_segments(
    path: Path, index_of: Callable[[Manifest], Part | None], *, segment_entries: int, show_progress: bool
) -> None:
    """Copy what is not deleted into new segments, publish them with a new index, and remove all earlier versions.

    Killed before it has published, it changes nothing; killed afterwards, what is left of the earlier versions is
    removed by the next writer.

    Args:
        path: The datastore's folder.
        index_of: Builds the index of a version that is not published yet.
        segment_entries: Entries a segment, about.
        show_progress: Show rate and time left on stderr.

    Raises:
        DatastoreCorrupt: A file does not match its checksum; its copy would get a new one.
    """
    with writing(path, "compact") as manifest:
        old, draft = Directory.open(path, manifest, verify=True), manifest.following("compact")
        rewrite(path, old, draft, index_of, segment_entries=segment_entries, show_progress=show_progress)


def rewrite(
    path: Path,
    old: Directory,
    draft: Manifest,
    index_of: Callable[[Manifest], Part | None],
    encode: Callable[[Tensor], Tensor] | None = None,
    *,
    counts: Sequence[npt.NDArray[np.uint32]] | None = None,
    segment_entries: int,
    show_progress: bool,
) -> None:
    """Publish a version that holds copies of all documents and knows no earlier one, and remove those.

    Args:
        path: The datastore's folder, held for writing.
        old: The documents.
        draft: The version, whose segments and index are still the earlier ones.
        index_of: As of `compact_segments`.
        encode: As of `copy_documents`.
        counts: As of `copy_documents`.
        segment_entries: Entries a segment, about.
        show_progress: Show rate and time left on stderr.
    """
    first, entries = draft.kept["next_segment"], draft.entries
    draft = replace(draft, parent=None, segments=(), index=None, corpus=_forgetting(draft.corpus, old))
    with progress("copying", entries, show=show_progress) as advance:
        for group in by_size(old, old, segment_entries):
            part = copy_documents(path, draft, old, group, advance, encode, counts)
            draft = replace(draft, segments=(*draft.segments, part), kept={**draft.kept, **segment_used(draft)})
    kept = {**draft.kept, "oldest": draft.version, "first_segment": first, "first_index": draft.version}
    draft = replace(draft, kept=kept)
    finished = replace(draft, index=index_of(draft))
    finished.publish(path)
    sweep(path, finished)


def _forgetting(corpus: dict[str, Any], old: Directory) -> dict[str, Any]:
    """Return what a manifest says of the corpus, without the names of documents that are gone."""
    for segment, deleted in zip(old.segments, old.deleted, strict=True):
        for number in np.flatnonzero(deleted):
            name = segment.document(int(number))["id"]
            if names(corpus["source"], name) and old.with_id(name) is None:
                return {**corpus, "source": "documents that were removed since, and others"}
    return corpus
