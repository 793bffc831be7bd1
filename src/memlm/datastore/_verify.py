"""Looking for damage, and for traces of what was deleted; neither trusts what opening a datastore trusts."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import DatastoreError
from ..files import json_bytes
from ..progress import progress
from ._manifest import CURRENT, Manifest, manifest_name
from ._segment import Segment, sha256
from ._stored import Directory, names, open_segments
from ._version import Version

_SAMPLE = 4096  # keys of a segment that are looked at
_PIECE = 64  # bytes of a text that are searched for at once


def verify(path: str | Path, *, show_progress: bool = False) -> list[str]:
    """Look for damage in all versions that are kept: every checksum, structure, documents, a sample of keys.

    Args:
        path: The datastore's folder; it is only read.
        show_progress: Show rate and time left on stderr.

    Returns:
        What is wrong, a line each; empty where the datastore is sound.
    """
    path = Path(path)
    found: list[str] = []
    versions: list[Manifest] = []
    try:
        for manifest in Manifest.load(path).history(path):
            versions.append(manifest)  # noqa: PERF402  (what was read before an error counts)
    except DatastoreError as error:
        found.append(str(error))
    found += [_altered(path / name) for name in [CURRENT, *(manifest_name(item.version) for item in versions)]]
    found = [line for line in found if line]
    parts = {("segments", part.name): part for manifest in versions for part in manifest.segments}
    parts |= {("index", manifest.index.name): manifest.index for manifest in versions if manifest.index}
    parts |= {("codec", manifest.codec.name): manifest.codec for manifest in versions if manifest.codec}
    sound: set[tuple[str, str]] = set()
    with progress("verifying", len(parts), "parts", show=show_progress) as advance:
        for key, part in parts.items():
            try:
                part.check(path / key[0])
                sound.add(key)
            except DatastoreError as error:
                found.append(str(error))
            advance(1)
    checked: set[str] = set()
    for manifest in versions:
        try:
            if all(("segments", part.name) in sound for part in manifest.segments):
                directory = Directory(open_segments(path, manifest), manifest)
                found += wrong(directory, manifest, checked)
                others = (("index", manifest.index), ("codec", manifest.codec))
                if all(part is None or (kind, part.name) in sound for kind, part in others):
                    Version(path, manifest, verify=False)
        except DatastoreError as error:
            found.append(f"version {manifest.version}: {error}")
    return found


def _altered(file: Path) -> str:
    """Say so where the bytes of a manifest are not those that `write_json` writes, whatever they mean; "" otherwise."""
    try:
        data = file.read_bytes() if file.is_file() else b""  # a pipe or a device may have no end
        if data == json_bytes(json.loads(data)):
            return ""
    except (OSError, ValueError, RecursionError):
        pass
    return f"{file} is not as it was written; restore it from a copy"


def wrong(directory: Directory, manifest: Manifest, checked: set[str] | None = None) -> Iterator[str]:
    """Yield what does not fit together in the segments of a version, but those whose names are in `checked`."""
    checked = set() if checked is None else checked
    for segment in directory.segments:
        if segment.name not in checked:
            yield from _wrong(segment, manifest)
            checked.add(segment.name)
    seen: set[bytes] = set()
    for place in directory:
        digest = directory.segments[place.segment].ids[place.number].tobytes()
        if digest in seen:
            name = directory.document(place)["id"]
            yield f"version {manifest.version} has two documents with the id {name!r}; remove one, or restore a copy"
        seen.add(digest)


def _wrong(segment: Segment, manifest: Manifest) -> Iterator[str]:
    """Yield what does not fit together within a segment."""
    for number in range(segment.documents):
        document = segment.document(number)
        digests = segment.ids[number].tobytes(), segment.texts[number].tobytes()
        if digests != (sha256(document["id"]), sha256(document["text"])) or document["sha256"] != digests[1].hex():
            yield f"{segment.folder}: document {number} does not match its digests; restore it from a copy"
        spans = segment.spans[segment.rows(number)]
        if len(spans) and (spans.max() > len(document["text"]) or (spans[:, 0] > spans[:, 1]).any()):
            yield f"{segment.folder}: entries of document {number} lie outside its text; restore it from a copy"
        if not segment.pruned(number).sound:
            what = f"entries of document {number} have positions or counts that cannot be"
            yield f"{segment.folder}: {what}; restore it from a copy"
    if segment.entries and segment.values.max() >= manifest.tokenizer["vocab_size"]:
        yield f"{segment.folder}: token ids lie outside the vocabulary; restore it from a copy"
    rows = np.unique(np.linspace(0, max(0, segment.entries - 1), min(segment.entries, _SAMPLE)).astype(np.int64))
    if not bool(segment.keys[rows].isfinite().all()):
        yield f"{segment.folder}: keys are not finite; restore it from a copy"


def audit(path: str | Path, document_id: str, text: str | None = None) -> list[str]:
    """Look for traces of a document in every version that is kept and in every file of the folder.

    Args:
        path: The datastore's folder; it is only read.
        document_id: Its id.
        text: Its text; pieces of 64 bytes are then searched for, too, and found also where other documents share them.

    Returns:
        Where traces are, a line each; empty where there are none.

    Raises:
        DatastoreError: There is no datastore, or it is damaged.
    """
    path = Path(path)
    found = []
    current = Manifest.load(path)
    for manifest in current.history(path):
        place = Directory.open(path, manifest).with_id(document_id)
        if place is not None:
            advice = "remove it" if manifest == current else "compact the datastore"
            found.append(f"version {manifest.version} holds it: {advice}")
        elif names(manifest.corpus["source"], document_id) or names(manifest.change, document_id):
            found.append(f"version {manifest.version} names it as a source: compact the datastore")
    needles = {"its id": [b'{"id": ' + json.dumps(document_id).encode() + b", ", sha256(document_id)]}
    if text is not None:
        escaped = json.dumps(text, ensure_ascii=True)[1:-1].encode()
        pieces = [escaped[start : start + _PIECE] for start in range(0, max(1, len(escaped) - _PIECE + 1), _PIECE)]
        digest = sha256(text)
        needles |= {"the digest of its text": [digest, digest.hex().encode()], "pieces of its text": pieces}
    for file in sorted(item for item in path.rglob("*") if item.is_file() and item.stat().st_size):
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for what, pieces in needles.items():
                if any(data.find(piece) >= 0 for piece in pieces):
                    found.append(f"{file.relative_to(path)} holds {what}")
    return found
