"""The manifest: what a version of a datastore consists of, and what it is bound to."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import DatastoreCorrupt, DatastoreError, DatastoreMismatch, FormatVersionError
from ..evidence import METRICS
from ..files import file_sha256, sync_directory, sync_file, write_json

FORMAT = "memlm-datastore"
FORMAT_VERSION = 1
_NAME = re.compile(r"manifest-(\d{6,})\.json")
_PART = re.compile(r"[0-9a-z-]+")
_FILE = re.compile(r"[0-9a-z]+\.[0-9a-z]+")
SEGMENT_FILES = ("documents.jsonl", "entries.safetensors", "keys.safetensors")

# What a manifest must hold at least: types of values, more of the same for objects, one pattern for a whole list.
_FILES: dict[str, Any] = {"bytes": int, "sha256": str}
_SITE: dict[str, Any] = {"name": str, "path": str, "tensor": str}
_SHAPE: dict[str, Any] = {
    "version": int,
    "created": str,
    "created_by": str,
    "encoder": {"name": str, "architecture": str, "sha256": str, "key_site": _SITE},
    "tokenizer": {"sha256": str, "vocab_size": int},
    "windows": {"context": int, "stride": int},
    "metric": str,
    "keys": {"dtype": str, "width": int},
    "values": {"dtype": str},
    "corpus": {"source": str, "skipped": int},
    "segments": [
        {"name": str, "files": {name: _FILES for name in SEGMENT_FILES}, "details": {"entries": int, "documents": int}}
    ],
}
_INDEX_SHAPE: dict[str, Any] = {"name": str, "files": {}, "details": {"kind": str}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A segment or an index: a folder of immutable files.

    Attributes:
        name: Of the folder.
        files: File name → {"bytes", "sha256"}.
        details: What kind of part needs: a segment's numbers of entries and documents, an index's settings.
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
        home = folder.parent.resolve()
        for name, expected in self.files.items():
            path = folder / self.name / name
            if not path.resolve().is_relative_to(home):
                raise DatastoreCorrupt(f"{path} is a link out of the datastore; put the file itself in its place")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One version of a datastore; see docs/datastore-format.md for every field."""

    version: int
    created: str
    created_by: str
    encoder: dict[str, Any]
    tokenizer: dict[str, Any]
    windows: dict[str, int]
    metric: str
    keys: dict[str, Any]
    values: dict[str, Any]
    corpus: dict[str, Any]
    segments: tuple[Part, ...]
    index: Part | None

    @property
    def entries(self) -> int:
        """Entries in all segments."""
        return sum(segment.details["entries"] for segment in self.segments)

    @property
    def documents(self) -> int:
        """Documents in all segments."""
        return sum(segment.details["documents"] for segment in self.segments)

    @property
    def content_sha256(self) -> str:
        """Fingerprint of everything stored, whatever the index: the same for every copy."""
        files = {part.name: {name: file["sha256"] for name, file in part.files.items()} for part in self.segments}
        return content_sha256({"encoder": self.encoder["sha256"], "segments": files})

    def publish(self, path: Path) -> None:
        """Make this the current version of the datastore at `path`, in one step."""
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        write_json(path / f"manifest-{self.version:06d}.json", {**content, "sha256": content_sha256(content)})

    def with_index(self, index: Part | None) -> Manifest:
        """Return the next version, with another index."""
        return replace(self, version=self.version + 1, index=index)

    def _check_values(self, version: int) -> None:
        """Raise ValueError where a value has the right type but cannot be."""
        if self.version != version:
            raise ValueError(f"its version is {self.version}, its name says {version}")
        datetime.fromisoformat(self.created)
        if self.metric not in METRICS:
            raise ValueError(f"its metric is {self.metric!r}; expected {' or '.join(METRICS)}")
        if self.keys["dtype"] not in ("float16", "bfloat16") or not 0 < self.keys["width"] < 1 << 31:
            raise ValueError(f"its keys are {self.keys}; expected float16 or bfloat16 of a positive width")
        if not 0 < self.entries < 1 << 48:
            raise ValueError(f"it has {self.entries} entries")
        names = [segment.name for segment in self.segments]
        if len(set(names)) < len(names):
            raise ValueError("it names a segment twice")

    def check_encoder(self, architecture: str, sha256: str) -> None:
        """Raise DatastoreMismatch unless the keys were made by this encoder."""
        if sha256 != self.encoder["sha256"]:
            raise DatastoreMismatch(
                f"the datastore holds keys of {self.encoder['name']} ({self.encoder['architecture']}, "
                f"{self.encoder['sha256'][:12]}), but the model given is a {architecture} with fingerprint "
                f"{sha256[:12]}; use that model, or build a datastore for this one"
            )

    def check_bound(self, identity: dict[str, Any]) -> None:
        """Raise DatastoreMismatch unless encoder, tokenizer and key site are those the datastore was built with."""
        other = identity["encoder"]
        if other["sha256"] != self.encoder["sha256"]:
            raise DatastoreMismatch(
                f"the datastore was built with {self.encoder['name']} ({self.encoder['sha256'][:12]}), but the model "
                f"given is {other['name']} ({other['sha256'][:12]}); use that model, or build a datastore for this one"
            )
        if identity["tokenizer"]["sha256"] != self.tokenizer["sha256"]:
            raise DatastoreMismatch(
                f"the datastore was built with the tokenizer {self.tokenizer['sha256'][:12]} of "
                f"{self.encoder['name']}, but the one given is {identity['tokenizer']['sha256'][:12]} of "
                f"{other['name']}; token ids would mean other text: use the same tokenizer"
            )
        if _site(other) != _site(self.encoder):
            raise DatastoreMismatch(
                f"the datastore holds keys from {_site(self.encoder)}, but the model is read at {_site(other)}; pass "
                f"key_site={self.encoder['key_site']['name']!r}"
            )

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read the current version of the datastore at `path`.

        Raises:
            DatastoreError: There is no datastore.
            FormatVersionError: It was written by a newer memlm.
            DatastoreCorrupt: The manifest is damaged, or names files outside the datastore.
        """
        found = [(int(match[1]), name) for name in _names(path) if (match := _NAME.fullmatch(name))]
        if not found:
            raise DatastoreError(f"{path} holds no datastore; `memlm build` makes one")
        file = path / max(found)[1]
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            _check(content["format_version"], int, "format_version")
            if content["format_version"] > FORMAT_VERSION:  # checked first: nothing else is known of a newer one
                raise FormatVersionError(
                    f"{path} has format version {content['format_version']}; this memlm reads up to {FORMAT_VERSION}: "
                    "install a newer memlm"
                )
            if content["format_version"] < 1:
                raise ValueError(f"its format version is {content['format_version']}")
            if content.pop("sha256") != content_sha256(content):
                raise ValueError("its content does not match its checksum")
            content.pop("format"), content.pop("format_version")
            _check(content, _SHAPE, "the manifest")
            segments = tuple(_part(item) for item in content.pop("segments"))
            index = content.pop("index")
            if index is not None:
                _check(index, _INDEX_SHAPE, "index")
            manifest = cls(**content, segments=segments, index=None if index is None else _part(index))
            manifest._check_values(max(found)[0])
            return manifest
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise DatastoreCorrupt(
                f"{file} is not a sound manifest ({type(error).__name__}: {error}); restore it from a copy or build "
                "again"
            ) from error


def content_sha256(content: dict[str, Any]) -> str:
    """Return the checksum of a manifest: of its JSON without this field, in ASCII, keys sorted, no white space."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check(value: Any, shape: Any, where: str) -> None:
    """Raise ValueError unless a JSON value has the types that `shape` asks for; whole numbers may not be negative."""
    kind = shape if isinstance(shape, type) else type(shape)
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
        wanted = "a whole number" if kind is int else kind.__name__
        raise ValueError(f"{where} is {str(value)[:40]!r}; expected {wanted}")
    if isinstance(shape, dict):
        for name, inner in shape.items():
            if name not in value:
                raise ValueError(f"{where} lacks {name!r}")
            _check(value[name], inner, name)
    if isinstance(shape, list):
        for item in value:
            _check(item, shape[0], where)


def _names(path: Path) -> list[str]:
    return [item.name for item in path.iterdir()] if path.is_dir() else []


def _site(encoder: dict[str, Any]) -> str:
    return f"{encoder['key_site']['path']} ({encoder['key_site']['tensor']})"


def _part(item: dict[str, Any]) -> Part:
    part = Part(**item)
    for name, file in part.files.items():
        _check(file, _FILES, name)
    if not _PART.fullmatch(part.name) or not all(_FILE.fullmatch(name) for name in part.files):
        raise ValueError(f"unsafe file names in part {part.name!r}")
    return part
