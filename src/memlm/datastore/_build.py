"""Building a datastore: documents → keys → segments → manifest."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ..documents import Corpus, Document, describe
from ..errors import CorpusError, DatastoreError
from ..files import sync_directory
from ..progress import progress
from ._manifest import Manifest, Part
from ._segment import KEY_TYPES, SegmentWriter, value_type


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
    key_dtype: str,
    segment_entries: int,
    show_progress: bool,
) -> Manifest:
    """Write the segments and the first manifest of a datastore; on any error nothing is left of them.

    Raises:
        CorpusError: No text, or unreadable text.
        DatastoreError: `path` is taken, or the disk is full.
        KeyOverflow: Keys are not finite.
    """
    from .. import __version__

    if path.exists() and (not path.is_dir() or any(item.name != "segments" for item in path.iterdir())):
        raise DatastoreError(f"{path} exists already; name a new folder, or remove it first")
    existed = path.exists()
    shutil.rmtree(path / "segments", ignore_errors=True)  # left by a build that was killed
    corpus = Corpus(source)
    identity = encoder.identity
    vocab_size = identity["tokenizer"]["vocab_size"]
    parts: list[Part] = []
    try:
        path.mkdir(parents=True, exist_ok=True)
        with progress("reading keys", None, show=show_progress) as advance:
            for group in _groups(encoder, corpus, segment_entries):
                name = f"{len(parts):06d}"
                folder = path / "segments" / name
                settings = {"key_dtype": key_dtype, "key_width": encoder.key_width, "vocab_size": vocab_size}
                writer = SegmentWriter(folder, group, **settings)
                for rows, keys in encoder.keys(item.ids for item in group):
                    writer.write_keys(rows, keys)
                    advance(len(rows))
                parts.append(Part.describe(folder.parent, name, writer.finish()))
                sync_directory(folder)
        manifest = Manifest(
            version=1,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            created_by=f"memlm {__version__}",
            encoder=identity["encoder"],
            tokenizer=identity["tokenizer"],
            windows=identity["windows"],
            metric="squared_l2",
            keys={"dtype": key_dtype, "width": encoder.key_width},
            values={"dtype": {"U16": "uint16", "U32": "uint32"}[value_type(vocab_size)]},
            corpus={"source": describe(source), "skipped": len(corpus.skipped)},
            segments=tuple(parts),
            index=None,
        )
        if not manifest.entries:
            raise CorpusError(f"no token of {describe(source)} can be stored: every document has one token or none")
        manifest.publish(path)
    except BaseException as error:
        shutil.rmtree(path / "segments" if existed else path, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DatastoreError(
                f"no space left for the datastore at {path}; it was removed again: free some, or name another place. "
                f"An entry takes about {KEY_TYPES[key_dtype][1].itemsize * encoder.key_width + 20} bytes"
            ) from error
        raise
    return manifest


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
