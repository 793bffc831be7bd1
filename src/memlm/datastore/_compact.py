"""Compaction: everything deleted leaves the disk, small segments become large ones, one index covers all entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..progress import progress
from ._change import by_size, copy_documents
from ._manifest import Manifest
from ._part import Part
from ._stored import Directory
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
    """
    with writing(path, "compact") as manifest:
        old = Directory.open(path, manifest)
        draft = manifest.following("compact")
        draft = replace(draft, parent=None, segments=(), index=None)
        with progress("copying", manifest.entries, show=show_progress) as advance:
            for group in by_size(old, old, segment_entries):
                part = copy_documents(path, draft, old, group, advance)
                draft = replace(draft, segments=(*draft.segments, part), kept={**draft.kept, **segment_used(draft)})
        first = manifest.kept["next_segment"]
        kept = {**draft.kept, "oldest": draft.version, "first_segment": first, "first_index": draft.version}
        draft = replace(draft, kept=kept)
        compacted = replace(draft, index=index_of(draft))
        compacted.publish(path)
        sweep(path, compacted)
