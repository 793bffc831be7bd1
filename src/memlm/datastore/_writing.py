"""One writer at a time: the lock, what a killed writer left, and new segments."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..errors import DatastoreCorrupt, DatastoreError
from ..files import write_json
from ._manifest import FIRST_KEPT, Manifest, now
from ._part import CODEC_FILE, SEGMENT_FILES, Part
from ._segment import SegmentWriter, Stored

_HOLDER = ".writer.json"
_MANIFEST = re.compile(r"manifest-(\d{6,})\.json")
_NUMBERED = re.compile(r"\d{6,}")
_TEMPORARY = re.compile(r"\.(manifest-\d+|current|\.writer)\.json\.\d+\.tmp")


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Keep other writers out of a folder for the block. A lock dies with its process, in whatever way that ends.

    Args:
        path: The datastore's folder.
        what: What is done, for a writer who finds the folder taken.

    Raises:
        DatastoreError: Another process writes there, or the folder cannot be written to.
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DatastoreError(f"{path} is being written to by {_holder(path)}; wait for it to end") from error
        except OSError:
            pass  # a file system without locks
        try:
            write_json(path / _HOLDER, {"pid": os.getpid(), "host": socket.gethostname(), "what": what, "since": now()})
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DatastoreError(
                    f"no space left for the datastore at {path} ({error.strerror}); it is as before the last commit: "
                    "free some, and run the same again"
                ) from error
            raise
        finally:
            (path / _HOLDER).unlink(missing_ok=True)
    finally:
        os.close(folder)


def _holder(path: Path) -> str:
    try:
        holder = json.loads((path / _HOLDER).read_text())
        return f"process {holder['pid']} on {holder['host']} ({holder['what']}, since {holder['since']})"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"


def _unwritable(path: Path, error: OSError) -> DatastoreError:
    return DatastoreError(f"{path} cannot be written to ({error.strerror or error}); copy it to a place that can")


@contextmanager
def writing(path: Path, what: str) -> Iterator[Manifest]:
    """Hold a datastore for writing and yield its current version.

    What a killed writer left is removed before, and on an error what was not published.

    Raises:
        DatastoreError: As `locked` and `Manifest.load`.
    """
    Manifest.load(path)  # before the lock, which writes
    with locked(path, what):
        manifest = Manifest.load(path)
        sweep(path, manifest)
        try:
            yield manifest
        except BaseException:
            sweep(path, Manifest.load(path))
            raise


def sweep(path: Path, manifest: Manifest | None) -> None:
    """Remove the files of no version that is kept: what a killed writer left, and what a compaction replaced.

    Everything is told by numbers alone, so that this takes no longer where there are many versions.

    Args:
        path: The datastore's folder, held for writing.
        manifest: The current version; None where there is none, so that everything of a datastore is removed.
    """
    kept, version = (FIRST_KEPT, 0) if manifest is None else (manifest.kept, manifest.version)
    versions = range(kept["oldest"], version + 1)
    segments = range(kept["first_segment"], kept["next_segment"])
    indexes = range(kept["first_index"], version + 1)  # named after the version that used it first
    codecs = range(kept["first_codec"], version + 1)  # as indexes
    for item in list(path.iterdir()):
        match = _MANIFEST.fullmatch(item.name)
        if _TEMPORARY.fullmatch(item.name) or (match and int(match[1]) not in versions):
            item.unlink(missing_ok=True)
    for name, numbers in (("segments", segments), ("index", indexes), ("codec", codecs)):
        folder = path / name
        if folder.is_symlink():  # what it leads to is not ours to remove
            raise DatastoreCorrupt(f"{folder} is a link; put the folder itself in its place")
        for item in list(folder.iterdir()) if folder.is_dir() else []:
            if _NUMBERED.fullmatch(item.name) and int(item.name) not in numbers:
                if item.is_symlink() or not item.is_dir():
                    item.unlink()
                else:
                    shutil.rmtree(item, ignore_errors=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def is_own(item: Path, path: Path) -> bool:
    """Tell whether a file or folder below `path` is one that memlm makes in the folder of a datastore."""
    names = item.relative_to(path).parts
    if item.is_symlink():
        return False
    if len(names) == 1:
        fixed = ("segments", "index", "codec", "current.json", _HOLDER)
        return names[0] in fixed or bool(_MANIFEST.fullmatch(names[0]) or _TEMPORARY.fullmatch(names[0]))
    inner = {"segments": SEGMENT_FILES, "index": ("index.faiss",), "codec": (CODEC_FILE,)}
    return (
        names[0] in inner
        and bool(_NUMBERED.fullmatch(names[1]))
        and len(names) < 4
        and names[2:] in [(), *((name,) for name in inner[names[0]])]
    )


def write_segment(
    path: Path, manifest: Manifest, documents: Sequence[Stored], keys: Iterable[tuple[Tensor, Tensor]]
) -> Part:
    """Write a segment that no version has yet; on any error nothing of it is left.

    Args:
        path: The datastore's folder, held for writing.
        manifest: The version to which the segment will be added.
        documents: In order.
        keys: Pairs of rows and keys; see `SegmentWriter.write_keys`.

    Raises:
        KeyOverflow: Keys are not finite.
        ShapeError: Some entry got no key.
    """
    name = f"{manifest.kept['next_segment']:06d}"
    settings = {
        "key_dtype": manifest.keys["dtype"],
        "key_width": manifest.keys["width"],
        "vocab_size": manifest.tokenizer["vocab_size"],
    }
    try:
        writer = SegmentWriter(path / "segments" / name, documents, **settings)
        for rows, block in keys:
            writer.write_keys(rows, block)
        details = {**writer.finish(), "deleted": {"documents": [], "entries": 0}}
        return Part.describe(path / "segments", name, details)
    except BaseException:
        shutil.rmtree(path / "segments" / name, ignore_errors=True)
        raise


def segment_used(manifest: Manifest) -> dict[str, int]:
    """Return what a new segment changes in a version's `kept`."""
    return {"next_segment": manifest.kept["next_segment"] + 1}
