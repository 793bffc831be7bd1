"""Building a datastore and adding to it: documents → keys → segments → versions.

Every finished segment is published as a version of its own. A build that was killed or broken off goes on behind the
last of them when it is run again, and ends with the same datastore.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from ..documents import Corpus, Document, describe
from ..errors import ConfigError, CorpusError, DatastoreError, ModelError
from ..progress import progress
from ._codec import open_codec
from ._manifest import CURRENT, FIRST_KEPT, KEY_TYPES, MOST_TOKENS, Manifest, manifest_name, now, read_current
from ._segment import STORED_TYPES, Stored, value_type
from ._stored import Directory, Place, with_deleted
from ._writing import is_own, locked, segment_used, sweep, write_segment, writing


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


class Group(NamedTuple):
    """Documents that become one segment, and what they take the place of.

    Attributes:
        items: Tokenized documents.
        replaced: Places of stored documents with the same ids.
        last: No other group follows.
    """

    items: list[Any]
    replaced: list[Place]
    last: bool


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
    """Write the segments of a new datastore, or the remaining ones of a build that did not come to its end.

    The datastore is complete only when its index is published, too; see `Datastore.build`. On an error the segments
    published until then are kept; where there are none, nothing is left.

    Raises:
        CorpusError: No text, or unreadable text.
        DatastoreError: `path` is taken, by a datastore or by something else, or cannot be written.
        DatastoreMismatch: An unfinished build has another model, tokenizer or key site.
        KeyOverflow: Keys are not finite.
    """
    if key_dtype not in KEY_TYPES:
        raise ConfigError(f"key type is {key_dtype!r}; expected one of {', '.join(KEY_TYPES)}")
    corpus = source if isinstance(source, Corpus) else Corpus(source)  # whoever made it reads what it left out
    _check_size(segment_entries)
    empty = _empty(encoder, metric, key_dtype, describe(source))
    with _building(path, empty) as manifest:
        directory, change = Directory.open(path, manifest, verify=True), f"build of {describe(source)}"
        for group in _groups(encoder, corpus, segment_entries, directory, replace_others=False):
            if group.last and not manifest.slots and not any(len(item.ids) > 1 for item in group.items):
                raise CorpusError(f"no token of {describe(source)} can be stored: every document has one token or none")
            manifest = _publish(path, manifest, directory, encoder, group, change, len(corpus.skipped), show_progress)
    return manifest


def add_documents(
    encoder: Encoder,
    source: Any,
    path: Path,
    *,
    replace_others: bool,
    segment_entries: int,
    show_progress: bool,
) -> tuple[int, int]:
    """Add documents as new segments; what is stored already, with the same id and content, is left out.

    Every segment is one commit, and takes the place of the documents that it replaces in the same commit.

    Returns:
        How many documents were added, and how many of them replaced others.

    Raises:
        DatastoreError: An id is stored with other content, and `replace_others` is false; what was published before
            stays.
        DatastoreMismatch: The encoder is another one.
    """
    _check_size(segment_entries)
    corpus = source if isinstance(source, Corpus) else Corpus(source)
    added = replaced = 0
    Manifest.load(path).check_bound(encoder.identity)
    with writing(path, "add") as manifest:
        directory = Directory.open(path, manifest)
        for group in _groups(encoder, corpus, segment_entries, directory, replace_others=replace_others):
            change = f"add {len(group.items)} of {describe(source)}"
            skipped = manifest.corpus["skipped"] + (len(corpus.skipped) if group.last else 0)
            manifest = _publish(path, manifest, directory, encoder, group, change, skipped, show_progress)
            added, replaced = added + len(group.items), replaced + len(group.replaced)
    return added, replaced


def _check_size(segment_entries: int) -> None:
    if segment_entries < 1:
        raise ConfigError(f"segment_entries is {segment_entries}; expected at least 1")


def _empty(encoder: Encoder, metric: str, key_dtype: str, source: str) -> Manifest:
    """Return what comes before the first version of a new datastore."""
    from .. import __version__

    identity = encoder.identity
    size = identity["tokenizer"]["vocab_size"]
    if not 0 < size <= MOST_TOKENS:
        raise ModelError(f"the vocabulary has {size} tokens; expected 1 to {MOST_TOKENS}: use another tokenizer")
    return Manifest(
        version=0,
        created=now(),
        created_by=f"memlm {__version__}",
        written=now(),
        change="",
        parent=None,
        kept=FIRST_KEPT,
        encoder=identity["encoder"],
        tokenizer=identity["tokenizer"],
        windows=identity["windows"],
        metric=metric,
        keys={"dtype": key_dtype, "width": encoder.key_width},
        values={"dtype": {"U16": "uint16", "U32": "uint32"}[value_type(size)]},
        corpus={"source": source, "skipped": 0, "complete": False},
        segments=(),
        index=None,
        codec=None,
    )


@contextmanager
def _building(path: Path, empty: Manifest) -> Iterator[Manifest]:
    """Hold a new folder, or that of an unfinished build, and yield where to go on.

    Where an error ends the block and nothing was published, the folder is left as it was found: absent or empty.
    """
    existed = path.exists()
    if existed and not path.is_dir():
        raise DatastoreError(f"{path} exists already, as a file; name a new folder")
    taken = [item for item in path.rglob("*") if not is_own(item, path)] if existed else []
    if taken:
        raise DatastoreError(f"{path} exists already (it holds {taken[0].name}); name a new folder, or remove it")
    if (path / CURRENT).exists():
        _unfinished(path, empty)  # before the lock, which writes
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatastoreError(f"{path} cannot be made ({error.strerror}); name another place") from error
    try:
        with locked(path, "build"):
            manifest = _reached(path, empty)
            sweep(path, manifest)
            try:
                yield empty if manifest is None else manifest
            except BaseException:
                sweep(path, Manifest.load(path) if (path / CURRENT).exists() else None)
                raise
    except BaseException as error:
        if not existed and not any(path.iterdir()):
            path.rmdir()
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            size = STORED_TYPES[empty.keys["dtype"]][1].itemsize * empty.keys["width"] + 20
            raise DatastoreError(f"{error}. An entry takes about {size} bytes") from error.__cause__
        raise


def _reached(path: Path, empty: Manifest) -> Manifest | None:
    """Return the version to go on from; None where there is none."""
    if (path / CURRENT).exists():
        return _unfinished(path, empty)
    manifests = [item.name for item in path.glob("manifest-*.json")]
    if not manifests:
        return None
    if manifests == [manifest_name(1)]:  # it was killed between a manifest and the file that makes it current
        Manifest.read(path, 1, None).publish(path)
        return _unfinished(path, empty)
    read_current(path)  # says what is missing
    return None


def _unfinished(path: Path, empty: Manifest) -> Manifest:
    """Return the version that an unfinished build has reached.

    Raises:
        DatastoreError: It is finished, or has other settings.
    """
    manifest = Manifest.load(path)
    if manifest.complete:
        raise DatastoreError(f"{path} exists already (it holds a datastore); name a new folder, or remove it")
    manifest.check_bound({"encoder": empty.encoder, "tokenizer": empty.tokenizer})
    for name, here in (("metric", manifest.metric), ("keys", manifest.encoder_keys), ("windows", manifest.windows)):
        if here != getattr(empty, name):
            raise DatastoreError(
                f"{path} holds an unfinished build whose {name} is {here}, not {getattr(empty, name)}; "
                "go on with the same settings, or remove it"
            )
    return manifest


def _groups(
    encoder: Encoder, corpus: Iterable[Document], entries: int, directory: Directory, *, replace_others: bool
) -> Iterator[Group]:
    """Tokenize the documents that are not stored yet and gather them until a segment is full; none is divided."""
    items: list[Any] = []
    replaced: list[Place] = []
    size = 0
    for document in corpus:
        place = directory.with_id(document.id)
        if place is not None and directory.holds(place, document):
            continue
        if place is not None and not replace_others:
            raise DatastoreError(
                f"{document.id!r} is stored already, with other content; replace it, or give the new one another id"
            )
        tokenized = encoder.tokenize(document)
        if items and size + len(tokenized.ids) > entries:
            yield Group(items, replaced, last=False)
            items, replaced, size = [], [], 0
        items.append(tokenized)
        replaced += [] if place is None else [place]
        size += len(tokenized.ids)
    if items:
        yield Group(items, replaced, last=True)


def _publish(
    path: Path,
    manifest: Manifest,
    directory: Directory,
    encoder: Encoder,
    group: Group,
    change: str,
    skipped: int,
    show_progress: bool,
) -> Manifest:
    """Write a group as a segment and publish it as the next version."""
    stored = [Stored.of(item, manifest.tokenizer["vocab_size"]) for item in group.items]
    total = sum(len(item.values) for item in stored)
    codec = open_codec(path, manifest)
    with progress("reading keys", total, show=show_progress) as advance:  # a bar a segment

        def keys() -> Iterator[tuple[Tensor, Tensor]]:
            for rows, block in encoder.keys(item.ids for item in group.items):
                yield rows, block if codec is None else codec.encode(block)
                advance(len(rows))

        part = write_segment(path, manifest, stored, keys())
    segments = (*with_deleted(manifest, directory, group.replaced), part)
    corpus = {**manifest.corpus, "skipped": skipped}
    following = manifest.following(change, segments=segments, corpus=corpus, kept=segment_used(manifest))
    following.publish(path)
    return following
