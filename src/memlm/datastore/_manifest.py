"""The manifest: what a version of a datastore consists of, and what it is bound to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import DatastoreCorrupt, DatastoreError, DatastoreMismatch, FormatVersionError
from ..evidence import METRICS
from ..files import write_json
from ._part import CODEC_FILE, FILE_FIELDS, SEGMENT_FILES, Part, check_deleted, check_fields, check_inside, part_of

FORMAT = "memlm-datastore"
FORMAT_VERSION = 4
CURRENT = "current.json"
KEY_TYPES = ("float16", "bfloat16")  # in which the keys of a model are stored
CODED_TYPES = ("int8", "float16")  # in which compressed ones are
MOST_TOKENS = 1 << 22  # in a vocabulary; what counts tokens takes memory for all of them
KEPT_VERSIONS = 64  # so that the manifests of many small additions do not pile up
# What a manifest must hold at least: types of values, more of the same for objects, one pattern for a whole list.
_SITE: dict[str, Any] = {"name": str, "path": str, "tensor": str}
_CURRENT: dict[str, Any] = {"version": int, "sha256": str}
# Of a new datastore
FIRST_KEPT = {"oldest": 1, "first_segment": 0, "next_segment": 0, "first_index": 1, "first_codec": 1}
_KEPT: dict[str, Any] = dict.fromkeys(FIRST_KEPT, int)
_DELETED: dict[str, Any] = {"documents": [[int]], "entries": int}
_KEYS: dict[str, Any] = {"dtype": str, "width": int}
_SHAPE: dict[str, Any] = {
    "version": int,
    "created": str,
    "created_by": str,
    "written": str,
    "change": str,
    "kept": _KEPT,
    "encoder": {"name": str, "architecture": str, "sha256": str, "dtype": str, "key_site": _SITE},
    "tokenizer": {"sha256": str, "vocab_size": int},
    "windows": {"context": int, "stride": int},
    "metric": str,
    "keys": _KEYS,
    "values": {"dtype": str},
    "corpus": {"source": str, "skipped": int},
    "segments": [
        {
            "name": str,
            "files": {name: FILE_FIELDS for name in SEGMENT_FILES},
            "details": {"entries": int, "documents": int, "deleted": _DELETED},
        }
    ],
}
_CODEC_SHAPE: dict[str, Any] = {"name": str, "files": {CODEC_FILE: FILE_FIELDS}, "details": {"keys": _KEYS}}
_INDEX_SHAPE: dict[str, Any] = {"name": str, "files": {}, "details": {"kind": str, "entries": int}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """One version of a datastore; see docs/datastore-format.md for every field."""

    version: int
    created: str
    created_by: str
    written: str
    change: str
    parent: dict[str, Any] | None
    kept: dict[str, int]
    encoder: dict[str, Any]
    tokenizer: dict[str, Any]
    windows: dict[str, int]
    metric: str
    keys: dict[str, Any]
    codec: Part | None
    values: dict[str, Any]
    corpus: dict[str, Any]
    segments: tuple[Part, ...]
    index: Part | None

    @property
    def slots(self) -> int:
        """Entries in all segments, deleted ones among them: every entry number is below it."""
        return sum(segment.details["entries"] for segment in self.segments)

    @property
    def entries(self) -> int:
        """Entries in all segments that are not deleted."""
        return self.slots - sum(segment.details["deleted"]["entries"] for segment in self.segments)

    @property
    def documents(self) -> int:
        """Documents in all segments that are not deleted."""
        deleted = (item for segment in self.segments for item in segment.details["deleted"]["documents"])
        return sum(segment.details["documents"] for segment in self.segments) - sum(b - a for a, b in deleted)

    @property
    def encoder_keys(self) -> dict[str, Any]:
        """Type and width of the keys as the encoder's were stored, before they were compressed."""
        return self.keys if self.codec is None else self.codec.details["keys"]

    @property
    def complete(self) -> bool:
        """False while a build has not come to its end."""
        return self.corpus["complete"]

    @property
    def files(self) -> dict[str, int]:
        """Bytes of every file of every part, by its path within the datastore's folder."""
        parts = [(f"{kind}/{part.name}", part.files) for kind, parts in self._parts.items() for part in parts]
        return {f"{where}/{name}": file["bytes"] for where, files in parts for name, file in files.items()}

    @property
    def _parts(self) -> dict[str, tuple[Part, ...]]:
        """Parts of each kind, by the name of the kind's folder."""
        kinds = {"segments": self.segments, "index": (self.index,), "codec": (self.codec,)}
        return {kind: tuple(part for part in parts if part is not None) for kind, parts in kinds.items()}

    @property
    def content_sha256(self) -> str:
        """Fingerprint of everything stored, whatever the index and the names of segments: the same for every copy."""
        files = [{name: file["sha256"] for name, file in part.files.items()} for part in self.segments]
        deleted = [part.details["deleted"]["documents"] for part in self.segments]
        codec = {} if self.codec is None else {"codec": self.codec.files[CODEC_FILE]["sha256"]}
        return content_sha256({"encoder": self.encoder["sha256"], "segments": files, "deleted": deleted, **codec})

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}

    def publish(self, path: Path) -> None:
        """Make this the current version of the datastore at `path`, in one step: the replacement of `current.json`."""
        content = self._content()
        digest = content_sha256(content)
        write_json(path / manifest_name(self.version), {**content, "sha256": digest})
        write_json(path / CURRENT, {"version": self.version, "sha256": digest})

    def following(self, change: str, **fields: Any) -> Manifest:
        """Return the next version, in which some fields are other ones.

        Args:
            change: What was done, for people.
            fields: New values.
        """
        parent = {"version": self.version, "sha256": content_sha256(self._content())}
        oldest = max(self.kept["oldest"], self.version + 2 - KEPT_VERSIONS)
        kept = {**self.kept, "oldest": oldest, **fields.pop("kept", {})}
        settings = {"written": now(), "change": change, "parent": parent, "kept": kept, **fields}
        return replace(self, version=self.version + 1, **settings)

    def alone(self) -> Manifest:
        """Return this version as one that knows of no earlier one, for a copy that takes none of them along."""
        return replace(self, parent=None, kept={**self.kept, "oldest": self.version})

    def _check_values(self, version: int) -> None:
        """Raise ValueError where a value has the right type but cannot be."""
        if self.version != version:
            raise ValueError(f"its version is {self.version}, its name says {version}")
        for moment in (self.created, self.written):
            datetime.fromisoformat(moment)
        if not isinstance(self.corpus.get("complete"), bool):
            raise ValueError("it does not say whether its corpus is complete")
        if self.parent is not None:
            check_fields(self.parent, _CURRENT, "parent")
            if self.parent["version"] >= self.version:
                raise ValueError(f"its parent is version {self.parent['version']}")
        if not self.kept["oldest"] <= self.version:
            raise ValueError(f"the oldest version kept is {self.kept['oldest']}")
        if self.metric not in METRICS:
            raise ValueError(f"its metric is {self.metric!r}; expected {' or '.join(METRICS)}")
        if not 0 < self.tokenizer["vocab_size"] <= MOST_TOKENS:
            raise ValueError(f"its vocabulary has {self.tokenizer['vocab_size']} tokens; expected 1 to {MOST_TOKENS}")
        if min(self.windows["context"], self.windows["stride"]) < 1:
            raise ValueError(f"its windows are {self.windows}; expected a context and a stride of at least 1")
        if self.encoder_keys["dtype"] not in KEY_TYPES or not 0 < self.encoder_keys["width"] < 1 << 31:
            raise ValueError(f"its keys are {self.encoder_keys}; expected float16 or bfloat16 of a positive width")
        if self.codec is not None and (
            self.keys["dtype"] not in CODED_TYPES or not 0 < self.keys["width"] <= self.encoder_keys["width"]
        ):
            raise ValueError(f"its compressed keys are {self.keys}; expected int8 or float16, and no wider than before")
        if self.slots >= 1 << 48:
            raise ValueError(f"it has {self.slots} entries")
        for segment in self.segments:
            check_deleted(segment)
        if self.index is not None and self.index.details["entries"] > self.slots:
            raise ValueError(f"its index holds {self.index.details['entries']} of {self.slots} entries")
        names = [segment.name for segment in self.segments]
        if len(set(names)) < len(names):
            raise ValueError("it names a segment twice")
        self._check_kept()

    def _check_kept(self) -> None:
        """Raise ValueError where a part is named that the next writer would take for a remnant, and sweep away."""
        kept, end = self.kept, self.version + 1
        ranges = {
            "segments": (self.segments, range(kept["first_segment"], kept["next_segment"])),
            "index": ((self.index,), range(kept["first_index"], end)),
            "codec": ((self.codec,), range(kept["first_codec"], end)),
        }
        if max(abs(number) for number in kept.values()) >= 1 << 48:
            raise ValueError("it counts more segments than there can be")
        for folder, (parts, numbers) in ranges.items():
            for part in parts:
                if part is not None and not (part.name.isdecimal() and int(part.name) in numbers):
                    raise ValueError(f"it names {folder}/{part.name}, and keeps {numbers.start} to {numbers.stop - 1}")

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
        current = read_current(path)
        while True:
            try:
                return cls.read(path, **current)
            except DatastoreCorrupt:
                newer = read_current(path)  # it was compacted between the two
                if newer == current:
                    raise
                current = newer

    @classmethod
    def read(cls, path: Path, version: int, sha256: str | None) -> Manifest:
        """Read one version of the datastore at `path`, known by the checksum of its manifest; raises as `load` does.

        None takes the checksum that the manifest itself gives.
        """
        file = path / manifest_name(version)
        try:
            content = _parsed(file)
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            check_fields(content["format_version"], int, "format_version")
            if content["format_version"] > FORMAT_VERSION:  # checked first: nothing else is known of a newer one
                raise FormatVersionError(
                    f"{path} has format version {content['format_version']}; this memlm reads up to {FORMAT_VERSION}: "
                    "install a newer memlm"
                )
            if content["format_version"] < FORMAT_VERSION:
                raise FormatVersionError(
                    f"{path} has format version {content['format_version']}, from before memlm's first release; this "
                    f"memlm reads {FORMAT_VERSION}: build again"
                )
            written, digest = content.pop("sha256"), content_sha256(content)
            if written != digest:
                raise ValueError("its content does not match its checksum")
            if sha256 not in (digest, None):
                raise ValueError("it is another one than the version after it, or current.json, names")
            content.pop("format"), content.pop("format_version")
            return cls.of(content, version)
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise DatastoreCorrupt(
                f"{file} is not a sound manifest ({type(error).__name__}: {error}); restore it from a copy or build "
                "again"
            ) from error

    @classmethod
    def of(cls, content: dict[str, Any], version: int) -> Manifest:
        """Return the manifest that a stranger's JSON object describes, all fields of it checked.

        Raises:
            ValueError, TypeError, KeyError: It cannot be one.
        """
        check_fields(content, _SHAPE, "the manifest")
        segments = tuple(part_of(item) for item in content["segments"])
        parts: dict[str, Any] = {}
        for name, shape in (("index", _INDEX_SHAPE), ("codec", _CODEC_SHAPE)):
            if content[name] is not None:
                check_fields(content[name], shape, name)
            parts[name] = None if content[name] is None else part_of(content[name])
        others = {name: value for name, value in content.items() if name not in ("segments", *parts)}
        manifest = cls(**others, segments=segments, **parts)
        manifest._check_values(version)
        return manifest

    def check_files(self, path: Path) -> None:
        """Raise DatastoreCorrupt where a file is missing, lies outside the datastore, or has another size."""
        for kind, parts in self._parts.items():
            for part in parts:
                part.check(path / kind, contents=False)

    def summary(self) -> dict[str, Any]:
        """Return what a list of versions shows, as plain values."""
        names = ("version", "written", "change", "documents", "entries")
        return {name: getattr(self, name) for name in names}

    def history(self, path: Path) -> Iterator[Manifest]:
        """Yield this version and those before it that are kept, the newest first; raises as `load` does."""
        manifest = self
        yield manifest
        while manifest.parent is not None and manifest.parent["version"] >= self.kept["oldest"]:
            manifest = Manifest.read(path, **manifest.parent)
            yield manifest


def manifest_name(version: int) -> str:
    """Return the name of a version's manifest."""
    return f"manifest-{version:06d}.json"


def now() -> str:
    """Return this moment as manifests write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_current(path: Path) -> dict[str, Any]:
    """Return number and checksum of the current version of the datastore at `path`.

    Raises:
        DatastoreError: There is no datastore.
        DatastoreCorrupt: The file that says so is damaged.
    """
    file = path / CURRENT
    if not file.is_file():
        if path.is_dir() and any(path.glob("manifest-*.json")):
            raise DatastoreCorrupt(
                f"{file} is missing: the datastore was never finished, or the file was lost; run the same build again, "
                "or restore it from a copy"
            )
        raise DatastoreError(f"{path} holds no datastore; `memlm build` makes one")
    try:
        current = _parsed(file)
        check_fields(current, _CURRENT, CURRENT)
        if set(current) != set(_CURRENT):
            raise ValueError(f"it has the fields {sorted(current)}")
        return current
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DatastoreCorrupt(f"{file} is damaged ({reason}); restore it from a copy") from error


def _parsed(file: Path) -> Any:
    """Read a file that `write_json` wrote."""
    check_inside(file, file.parent)
    if file.exists() and not file.is_file():
        raise ValueError("it is no regular file")  # a pipe or a device may have no end
    text = file.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        raise ValueError("it is truncated")
    return json.loads(text)


def content_sha256(content: dict[str, Any]) -> str:
    """Return the checksum of a manifest: of its JSON without this field, in ASCII, keys sorted, no white space.

    Raises:
        ValueError: It holds what no later version could be written with: NaN, infinity, or half a character.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    if "\\ud" in text:
        json.dumps(content, ensure_ascii=False).encode()
    return hashlib.sha256(text.encode()).hexdigest()


def _site(encoder: dict[str, Any]) -> str:
    return f"{encoder['key_site']['path']} ({encoder['key_site']['tensor']})"
