"""Which documents a version holds, and where: by id, pattern or metadata; deleting them."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..documents import Document
from ..errors import ConfigError
from ._manifest import Manifest
from ._part import Part
from ._segment import Segment, plain_metadata, sha256


class Place(NamedTuple):
    """Where a document lies: numbers of its segment and of the document in it."""

    segment: int
    number: int


def open_segments(path: Path, manifest: Manifest, known: Mapping[str, Segment] | None = None) -> list[Segment]:
    """Open the segments of a version; files' sizes are checked by who opens it.

    Args:
        path: The datastore's folder.
        manifest: The version.
        known: Segments that are open already, by name: parts are immutable, and names are used once.
    """
    known = {} if known is None else known
    settings = {
        "key_dtype": manifest.keys["dtype"],
        "key_width": manifest.keys["width"],
        "value_dtype": manifest.values["dtype"],
    }
    folder = path / "segments"
    return [known.get(part.name) or Segment(folder, part, **settings) for part in manifest.segments]


class Directory:
    """The documents of a version that are not deleted.

    Args:
        segments: Opened.
        manifest: The version.
    """

    def __init__(self, segments: list[Segment], manifest: Manifest) -> None:
        self.segments = segments
        self.deleted: list[npt.NDArray[np.bool_]] = [part.deleted for part in manifest.segments]

    @classmethod
    def open(cls, path: Path, manifest: Manifest, *, verify: bool = False) -> Directory:
        """Open the segments of a version, too; raises `DatastoreCorrupt`.

        Args:
            path: The datastore's folder.
            manifest: The version.
            verify: Compare every file with its checksum; otherwise only with its size.
        """
        for part in manifest.segments:
            part.check(path / "segments", contents=verify)
        return cls(open_segments(path, manifest), manifest)

    def live(self) -> npt.NDArray[np.bool_]:
        """Return whether an entry is not deleted, shape (slots,)."""
        parts = [
            ~np.repeat(deleted, np.diff(segment.entry_starts))
            for segment, deleted in zip(self.segments, self.deleted, strict=True)
        ]
        return np.concatenate([np.zeros(0, bool), *parts])

    def __iter__(self) -> Iterator[Place]:
        for segment, deleted in enumerate(self.deleted):
            for number in np.flatnonzero(~deleted):
                yield Place(segment, int(number))

    def with_id(self, document_id: str) -> Place | None:
        """Return where the document with an id lies; None if it is not there."""
        return self._first(sha256(document_id), "with_id")

    def with_text(self, text: str) -> Place | None:
        """Return where the first document with this very text lies; None if it is not there."""
        return self._first(sha256(text), "with_text")

    def _first(self, digest: bytes, find: str) -> Place | None:
        for segment, (opened, deleted) in enumerate(zip(self.segments, self.deleted, strict=True)):
            for number in getattr(opened, find)(digest):
                if not deleted[number]:
                    return Place(segment, number)
        return None

    def document(self, place: Place) -> dict[str, Any]:
        """Return a document's id, sha256, metadata and text."""
        return self.segments[place.segment].document(place.number)

    def holds(self, place: Place, document: Document) -> bool:
        """Tell whether the text and the metadata that lie at a place are those of a document."""
        same = self.segments[place.segment].texts[place.number].tobytes() == sha256(document.text)
        return same and canonical(self.document(place)["metadata"]) == canonical(plain_metadata(document))

    def chosen(self, ids: Iterable[str], pattern: str | None, where: Mapping[str, Any]) -> list[Place]:
        """Return the documents with these ids, and those that fit the pattern and the metadata, in their order.

        Args:
            ids: All of them must be there.
            pattern: Of ids, as in a shell: `*`, `?`, `[a-z]`; None leaves it to the metadata.
            where: Metadata that must be equal, as JSON is: 1 and 1.0 are, 1 and true are not.

        Raises:
            ConfigError: An id is not stored.
        """
        wanted = {name: canonical(value) for name, value in where.items()}
        places, missing = [], []
        for name in ids:
            place = self.with_id(name)
            (missing if place is None else places).append(name if place is None else place)
        if missing:
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ConfigError(f"no document has the id {missing[0]!r}{others}; nothing was removed")
        if pattern is not None or where:
            for place in self:
                document = self.document(place)
                metadata = document["metadata"]
                fits = pattern is None or fnmatch.fnmatchcase(document["id"], pattern)
                if fits and all(name in metadata and canonical(metadata[name]) == wanted[name] for name in wanted):
                    places.append(place)
        return sorted(set(places))


def names(text: str, document_id: str) -> bool:
    """Tell whether a manifest's words on where documents came from end in a document's id: it was a file's name."""
    return re.search(rf"(^|[/ ]){re.escape(document_id)}(,|$)", text) is not None


def canonical(value: Any) -> str:
    """Return a JSON value as text that is the same for equal values, whatever the order of fields.

    Python's own comparison would not do: to it NaN equals nothing, and true is 1.
    """
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value, sort_keys=True, default=str)


def with_deleted(manifest: Manifest, directory: Directory, places: Iterable[Place]) -> tuple[Part, ...]:
    """Return the segments of a version with more documents deleted, for the next version."""
    gone: dict[int, list[int]] = {}
    for place in places:
        gone.setdefault(place.segment, []).append(place.number)
    segments = list(manifest.segments)
    for number, documents in gone.items():
        deleted = segments[number].deleted
        deleted[documents] = True
        counts = np.diff(directory.segments[number].entry_starts)
        segments[number] = segments[number].with_deleted(deleted, int(counts[deleted].sum()))
    return tuple(segments)
