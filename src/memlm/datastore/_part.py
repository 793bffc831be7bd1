"""Parts of a datastore: segments, indexes and codecs, each a folder of immutable files that a manifest describes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DatastoreCorrupt
from ..files import file_sha256, sync_directory, sync_file

_PART = re.compile(r"[0-9a-z-]+")
_FILE = re.compile(r"[0-9a-z]+\.[0-9a-z]+")
CODEC_FILE = "codec.safetensors"
SEGMENT_FILES = ("documents.jsonl", "entries.safetensors", "keys.safetensors")
FILE_FIELDS: dict[str, Any] = {"bytes": int, "sha256": str}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A segment, an index or a codec: a folder of immutable files.

    Attributes:
        name: Of the folder.
        files: File name → {"bytes", "sha256"}.
        details: What kind of part needs: a segment's numbers of entries and documents, and which of these are deleted;
            an index's settings, and how many entries, from the first, it holds; the type and width of the keys that a
            codec was fitted to.
    """

    name: str
    files: dict[str, dict[str, Any]]
    details: dict[str, Any]

    def check(self, folder: Path, *, contents: bool = True) -> None:
        """Compare the files in a folder with their sizes and, if `contents`, with their checksums.

        Args:
            folder: Of all parts of this kind, just below the datastore's own.
            contents: Read every file.

        Raises:
            DatastoreCorrupt: A file is missing, lies outside the datastore, has another size or other content.
        """
        for name, expected in self.files.items():
            path = folder / self.name / name
            check_inside(path, folder.parent)
            if not path.is_file():
                raise DatastoreCorrupt(f"{path} is missing; restore it from a copy or build again")
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise DatastoreCorrupt(
                    f"{path} has {size} bytes; expected {expected['bytes']}: it was truncated or changed; restore it "
                    "from a copy or build again"
                )
            if contents and file_sha256(path) != expected["sha256"]:
                raise DatastoreCorrupt(
                    f"{path} does not match its checksum: its content was changed or damaged; restore it from a copy "
                    "or build again"
                )

    @property
    def deleted(self) -> npt.NDArray[np.bool_]:
        """Whether a document of this segment is deleted, shape (documents,)."""
        result = np.zeros(self.details["documents"], bool)
        for first, stop in self.details["deleted"]["documents"]:
            result[first:stop] = True
        return result

    def with_deleted(self, deleted: npt.NDArray[np.bool_], entries: int) -> Part:
        """Return this segment with other documents deleted, which have so many entries."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], deleted, [False]]).astype(np.int8)))
        ranges = [[int(first), int(stop)] for first, stop in edges.reshape(-1, 2)]
        return replace(self, details={**self.details, "deleted": {"documents": ranges, "entries": entries}})

    @classmethod
    def describe(cls, folder: Path, name: str, details: dict[str, Any]) -> Part:
        """Describe the files that lie in `folder/name` now, and make them survive a power failure."""
        files = {}
        for path in sorted((folder / name).iterdir()):
            sync_file(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        sync_directory(folder / name)
        sync_directory(folder)
        return cls(name=name, files=files, details=details)


def check_inside(path: Path, home: Path) -> None:
    """Raise DatastoreCorrupt where a path leads out of the datastore's folder by a link, or in a circle."""
    try:
        inside = path.resolve().is_relative_to(home.resolve())
    except (OSError, RuntimeError):  # which of them depends on Python's version
        inside = False
    if not inside:
        raise DatastoreCorrupt(f"{path} is a link out of the datastore; put the file itself in its place")


def part_of(item: dict[str, Any]) -> Part:
    """Return the part that a manifest describes; raise ValueError or TypeError where it cannot be one."""
    part = Part(**item)
    for name, file in part.files.items():
        check_fields(file, FILE_FIELDS, name)
    if not _PART.fullmatch(part.name) or not all(_FILE.fullmatch(name) for name in part.files):
        raise ValueError(f"unsafe file names in part {part.name!r}")
    return part


def check_deleted(segment: Part) -> None:
    """Raise ValueError unless the ranges of deleted documents rise within the segment."""
    last = -1
    for item in segment.details["deleted"]["documents"]:
        if len(item) != 2 or not last < item[0] < item[1] <= segment.details["documents"]:
            raise ValueError(f"segment {segment.name} has the deleted documents {item}")
        last = item[1]
    if segment.details["deleted"]["entries"] > segment.details["entries"]:
        raise ValueError(f"segment {segment.name} has more deleted entries than entries")


def check_fields(value: Any, shape: Any, where: str) -> None:
    """Raise ValueError unless a JSON value has the types that `shape` asks for; whole numbers may not be negative."""
    kind = shape if isinstance(shape, type) else type(shape)
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
        wanted = "a whole number, not negative" if kind is int else kind.__name__
        raise ValueError(f"{where} is {str(value)[:40]!r}; expected {wanted}")
    if isinstance(shape, dict):
        for name, inner in shape.items():
            if name not in value:
                raise ValueError(f"{where} lacks {name!r}")
            check_fields(value[name], inner, name)
    if isinstance(shape, list):
        for item in value:
            check_fields(item, shape[0], where)
