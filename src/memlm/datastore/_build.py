"""Building a datastore: documents → keys → segments → manifest."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..documents import Corpus, Document, describe
from ..errors import ConfigError, CorpusError, DatastoreError
from ..progress import progress
from ._manifest import Manifest, Part
from ._segment import KEY_TYPES, SegmentWriter, value_type

# Files of a build that was killed, as paths from the datastore's folder
_LEFTOVER = re.compile(
    r"segments(/\d{6,}(/(documents\.jsonl|(entries|keys)\.safetensors))?)?|\.manifest-\d+\.json\.\d+\.tmp"
)


class Encoder(Protocol):
    """What makes keys: a `LanguageModel`, or anything with the same four members."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the datastore is bound to: "encoder", "tokenizer" and "windows"."""
        ...

    @property
    def key_width(self) -> int:
        """Numbers in a key."""
        ...

    def tokenize(self, document: Document) -> Any:
        """Return the document with `ids`, int64 (length,), and `spans`, uint32 (length, 2)."""
        ...

    def keys(self, sequences: Iterable[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows and keys of all targets, in any order."""
        ...


def build_segments(
    encoder: Encoder,
    source: Any,
    path: Path,
    *,
    metric: str,
    key_dtype: str,
    segment_entries: int,
    show_progress: bool,
) -> Manifest:
    """Write the segments and the first manifest of a datastore; on any error nothing is left of them.

    Raises:
        CorpusError: No text, or unreadable text.
        DatastoreError: `path` is taken, or cannot be written.
        KeyOverflow: Keys are not finite.
    """
    from .. import __version__

    if key_dtype not in KEY_TYPES:
        raise ConfigError(f"key type is {key_dtype!r}; expected one of {', '.join(KEY_TYPES)}")
    if segment_entries < 1:
        raise ConfigError(f"segment_entries is {segment_entries}; expected at least 1")
    corpus = source if isinstance(source, Corpus) else Corpus(source)  # whoever made it reads what it left out
    identity = encoder.identity
    settings = {
        "key_dtype": key_dtype,
        "key_width": encoder.key_width,
        "vocab_size": identity["tokenizer"]["vocab_size"],
    }
    parts: list[Part] = []
    entry_bytes = KEY_TYPES[key_dtype][1].itemsize * encoder.key_width + 20
    with _new_folder(path, entry_bytes):
        for group in _groups(encoder, corpus, segment_entries):
            name = f"{len(parts):06d}"
            writer = SegmentWriter(path / "segments" / name, group, **settings)
            with progress("reading keys", writer.entries, show=show_progress) as advance:  # a bar a segment
                for rows, keys in encoder.keys(item.ids for item in group):
                    writer.write_keys(rows, keys)
                    advance(len(rows))
            parts.append(Part.describe(path / "segments", name, writer.finish()))
        manifest = Manifest(
            version=1,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            created_by=f"memlm {__version__}",
            encoder=identity["encoder"],
            tokenizer=identity["tokenizer"],
            windows=identity["windows"],
            metric=metric,
            keys={"dtype": key_dtype, "width": encoder.key_width},
            values={"dtype": {"U16": "uint16", "U32": "uint32"}[value_type(settings["vocab_size"])]},
            corpus={"source": describe(source), "skipped": len(corpus.skipped)},
            segments=tuple(parts),
            index=None,
        )
        if not manifest.entries:
            raise CorpusError(f"no token of {describe(source)} can be stored: every document has one token or none")
        manifest.publish(path)
    return manifest


@contextmanager
def _new_folder(path: Path, entry_bytes: int) -> Iterator[None]:
    """Make a folder and keep other builds out of it for the block; on an error leave it as found: absent or empty."""
    existed = path.exists()
    if existed and not path.is_dir():
        raise DatastoreError(f"{path} exists already, as a file; name a new folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DatastoreError(f"{path} cannot be made ({error.strerror}); name another place") from error
    try:
        _lock(folder, path)
        taken = [item for item in path.rglob("*") if not _is_leftover(item, path)]
        if taken:
            raise DatastoreError(f"{path} exists already (it holds {taken[0].name}); name a new folder, or remove it")
        _clear(path)
        try:
            yield
        except BaseException as error:
            _clear(path)
            if not existed:
                path.rmdir()
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DatastoreError(
                    f"no space left for the datastore at {path} ({error.strerror}); nothing of it was kept: free some, "
                    f"or name another place. An entry takes about {entry_bytes} bytes"
                ) from error
            raise
    finally:
        os.close(folder)


def _lock(folder: int, path: Path) -> None:
    """Hold a folder until its descriptor is closed, or the process ends in whatever way."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DatastoreError(f"{path} is being built by another process; wait for it, or name a new folder") from error
    except OSError:
        pass  # a file system without locks


def _is_leftover(item: Path, path: Path) -> bool:
    return not item.is_symlink() and _LEFTOVER.fullmatch(item.relative_to(path).as_posix()) is not None


def _clear(path: Path) -> None:
    """Remove everything that a build may have left."""
    shutil.rmtree(path / "segments", ignore_errors=True)
    for item in [*path.glob("manifest-*.json"), *path.glob(".manifest-*.tmp")]:
        item.unlink()


def _groups(encoder: Encoder, corpus: Iterable[Document], entries: int) -> Iterator[list[Any]]:
    """Tokenize documents and gather them until a segment is full; a document is never divided."""
    group: list[Any] = []
    size = 0
    for document in corpus:
        tokenized = encoder.tokenize(document)
        if group and size + len(tokenized.ids) > entries:
            yield group
            group, size = [], 0
        group.append(tokenized)
        size += len(tokenized.ids)
    if group:
        yield group
