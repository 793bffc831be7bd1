"""A datastore opened for reading, searching and changing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DatastoreCorrupt, DatastoreError
from ..evidence import METRICS, SQUARED_L2
from ..index import build_index, check_factory
from ._build import Encoder, add_documents, build_segments
from ._change import merge_documents, remove_documents, rollback_to
from ._compact import compact_segments
from ._compress import compress_segments
from ._export import export_documents
from ._fit_codec import check_codec
from ._import import Export, import_documents
from ._manifest import Manifest
from ._part import Part
from ._prune import check_pruning, merged, owners_of, prune_segments
from ._version import Version
from ._writing import writing

SEGMENT_ENTRIES = 1 << 18  # what a killed build loses at most; a million keys of width 256 are four segments


class Datastore(Version):
    """Entries (key, value) of every token of a corpus, on disk, with the documents they come from.

    Open one with `Datastore(path)`, make one with `Datastore.build`. It shows the version that it opened, whatever
    others write, until `refresh`; its own changes it shows at once. Entries are numbered; what is deleted leaves its
    numbers empty until `compact` numbers anew.

    Args:
        path: Folder of the datastore.
        verify: Compare every file with its checksum; otherwise only with its size.
        version: An earlier version that is still kept; None opens the current one.

    Raises:
        ConfigError: That version is not kept.
        DatastoreError: There is none, it is damaged, or it was written by a newer memlm.
    """

    def __init__(self, path: str | Path, *, verify: bool = True, version: int | None = None) -> None:
        self.path = Path(path)
        self._open(verify, version)

    def _open(self, verify: bool, version: int | None = None) -> None:
        """Open the current version; another try where a compaction removes its files at this very moment."""
        while True:
            current = Manifest.load(self.path)
            try:
                manifest = current if version in (None, current.version) else self._kept(current, version)
                return self._show(manifest, verify)
            except (DatastoreError, FileNotFoundError) as error:
                if Manifest.load(self.path) != current:
                    continue
                if isinstance(error, FileNotFoundError):
                    raise DatastoreCorrupt(f"{error.filename} is missing; restore it from a copy") from error
                raise

    def _kept(self, current: Manifest, version: int | None) -> Manifest:
        kept = {manifest.version: manifest for manifest in current.history(self.path)}
        if version not in kept:
            raise ConfigError(f"version is {version}; expected one that is kept: {min(kept)} to {max(kept)}")
        return kept[version]

    @classmethod
    def build(
        cls,
        encoder: Encoder,
        source: Any,
        path: str | Path,
        *,
        index: str = "auto",
        metric: str = SQUARED_L2,
        key_dtype: str = "float16",
        segment_entries: int = SEGMENT_ENTRIES,
        show_progress: bool = True,
    ) -> Datastore:
        """Store every token of a corpus: what the model saw before it, and which token it was.

        A build that was killed, interrupted or broken off by an error goes on behind its last finished segment when it
        is called again, and ends with the same datastore.

        Args:
            encoder: A `LanguageModel`.
            source: Documents; anything that `Corpus` takes.
            path: Folder to make.
            index: "auto", "exact", or a FAISS factory string; see `build_index`.
            metric: "squared_l2", or "inner_product" for TRIME; distances are then negative inner products.
            key_dtype: "float16" or "bfloat16".
            segment_entries: Entries a segment, about; a document is never divided. Bounds the text held in memory and
                what a killed build loses.
            show_progress: Show rate and time left on stderr.

        Raises:
            ConfigError: The metric or the key type is not known.
            CorpusError: No text, or unreadable text.
            DatastoreError: The folder is taken, the disk is full, keys are not finite, or the index cannot be built.
                Finished segments are kept, and searched exactly until the build is called again.
        """
        path = Path(path)
        if metric not in METRICS:
            raise ConfigError(f"metric is {metric!r}; expected {' or '.join(METRICS)}")
        check_factory(index, encoder.key_width, metric)
        build_segments(
            encoder,
            source,
            path,
            metric=metric,
            key_dtype=key_dtype,
            segment_entries=segment_entries,
            show_progress=show_progress,
        )
        datastore = cls(path, verify=False)
        datastore.build_index(index, show_progress=show_progress)
        return datastore

    def build_index(self, factory: str = "auto", *, show_progress: bool = False) -> None:
        """Build a search index over all entries and publish it as a new version of the datastore."""
        with writing(self.path, "index") as manifest:
            if manifest != self.manifest:
                self._show(manifest, verify=False)
            name = f"{manifest.version + 1:06d}"
            part = build_index(self.keys, self.path / "index", factory, name=name, show_progress=show_progress)
            corpus = {**manifest.corpus, "complete": True}
            if part is not None or manifest.index is not None or manifest.corpus != corpus:
                manifest = manifest.following(f"index {factory}", index=part, corpus=corpus)
                manifest.publish(self.path)
            self._show(manifest, verify=False)

    def add(
        self,
        encoder: Encoder,
        source: Any,
        *,
        replace: bool = False,
        segment_entries: int = SEGMENT_ENTRIES,
        show_progress: bool = False,
    ) -> tuple[int, int]:
        """Add documents; what is stored already, with the same id, text and metadata, is left out.

        New entries are searched exactly, beside the index, until `compact` or `build_index`. Finished segments are
        kept on an error, so that adding the same again goes on behind them.

        Args:
            encoder: The model that made the keys.
            source: Documents; anything that `Corpus` takes.
            replace: Take the place of documents with the same ids, in the same commit.
            segment_entries: Entries a commit, about; a document is never divided.
            show_progress: Show rate and time left on stderr.

        Returns:
            How many documents were added, and how many of them replaced others.

        Raises:
            CorpusError: No text, or unreadable text.
            DatastoreError: Another process writes, the disk is full, or an id is stored with other content.
            DatastoreMismatch: The encoder is another one.
        """
        try:
            return add_documents(
                encoder,
                source,
                self.path,
                replace_others=replace,
                segment_entries=segment_entries,
                show_progress=show_progress,
            )
        finally:
            self.refresh()

    def remove(
        self,
        ids: Iterable[str] = (),
        *,
        pattern: str | None = None,
        where: Mapping[str, Any] | None = None,
        dry_run: bool = False,
    ) -> list[str]:
        """Delete documents, in one commit. Nothing returns them from then on; `rollback` brings them back until
        `compact`, which takes them off the disk.

        Args:
            ids: Of documents; all of them must be there.
            pattern: Of ids, as in a shell: `*`, `?`, `[a-z]`.
            where: Metadata that must be equal; with a pattern, both must fit.
            dry_run: Only tell which.

        Returns:
            Ids of the documents.

        Raises:
            ConfigError: An id is not stored; nothing is removed.
            DatastoreError: Another process writes.
        """
        ids = [ids] if isinstance(ids, str) else ids
        names = remove_documents(self.path, ids, pattern, {} if where is None else where, dry_run=dry_run)
        self.refresh()
        return names

    def merge(
        self,
        other: str | Path,
        *,
        replace: bool = False,
        segment_entries: int = SEGMENT_ENTRIES,
        show_progress: bool = False,
    ) -> tuple[int, int]:
        """Add the documents of another datastore with their keys; see `add`. No model is needed."""
        try:
            return merge_documents(
                self.path,
                Path(other),
                replace_others=replace,
                segment_entries=segment_entries,
                show_progress=show_progress,
            )
        finally:
            self.refresh()

    def compact(
        self,
        *,
        index: str | None = None,
        segment_entries: int = SEGMENT_ENTRIES,
        show_progress: bool = False,
    ) -> None:
        """Take everything deleted off the disk, join small segments, and index all entries.

        Entries are numbered anew, and earlier versions are gone. Readers keep what they have opened.

        Args:
            index: "auto", "exact" or a FAISS factory string; None keeps the kind of index.
            segment_entries: Entries a segment, about.
            show_progress: Show rate and time left on stderr.

        Raises:
            DatastoreError: Another process writes, or the disk is full; nothing has changed then.
        """
        compact(self.path, index=index, segment_entries=segment_entries, show_progress=show_progress)
        self.refresh()

    def compress(
        self,
        width: int,
        key_dtype: str = "int8",
        *,
        index: str = "auto",
        segment_entries: int = SEGMENT_ENTRIES,
        show_progress: bool = False,
    ) -> None:
        """Store keys as fewer and shorter numbers: their principal components, in 8 bits each; see `Codec`.

        Keys that are added later are compressed in the same way, queries are projected when they are searched for.
        Everything deleted leaves the disk, as by `compact`, and the keys as they were leave it, too: only building
        again brings them back. Distances become a little smaller, so mixtures want to be fitted again.

        Args:
            width: Numbers to keep of a key, at most those that it has, and fewer than there are entries. With "int8"
                and half of them, keys take a quarter of the bytes that they take as built.
            key_dtype: "int8", or "float16" to project alone.
            index: "auto", "exact" or a FAISS factory string.
            segment_entries: Entries a segment, about.
            show_progress: Show rate and time left on stderr.

        Raises:
            ConfigError: The width or the type cannot be, or there are no more entries than `width`.
            DatastoreError: The keys are compressed already, there are none, another process writes, or the disk is
                full; nothing has changed then.
        """
        self.refresh()
        check_codec(width, key_dtype, self.width)
        check_factory(index, width, self.metric)
        compress_segments(
            self.path,
            _indexing(self.path, index, show_progress),
            width=width,
            key_dtype=key_dtype,
            segment_entries=segment_entries,
            show_progress=show_progress,
        )
        self.refresh()

    def prune(
        self,
        neighbors: int = 8,
        *,
        distance: float | None = None,
        seed: int = 0,
        dry_run: bool = False,
        index: str | None = None,
        segment_entries: int = SEGMENT_ENTRIES,
        show_progress: bool = False,
    ) -> int:
        """Merge entries of a document that are alike into one that counts for all of them (He et al. 2021).

        Entries with the same value and the same key become one. Then, in a random order, each entry takes in those of
        its nearest neighbors that have its value, belong to its document, and have neither been taken in nor taken in
        others. What an entry counts for multiplies its weight in p_kNN. No entry counts for one of another document, so
        removing a document goes on to remove all that it contributed, and nothing else.

        Where any are merged, everything deleted leaves the disk, as by `compact`, and so do the merged entries: only
        building again brings them back. Documents that are added later are not pruned. Mixtures want to be fitted
        again.

        Args:
            neighbors: Nearest entries, in the whole datastore, among which each looks; 0 merges equal keys alone, and
                leaves p_kNN as it is (over all neighbors: among the k nearest there is room for others).
            distance: Largest squared distance between what is merged; None for any.
            seed: Of the order.
            dry_run: Only count.
            index: "auto", "exact" or a FAISS factory string; None keeps the kind of index.
            segment_entries: Entries a segment, about.
            show_progress: Show rate and time left on stderr.

        Returns:
            How many entries were merged into others; where there are none, no version is written.

        Raises:
            ConfigError: A number cannot be, or keys are searched by inner product and `neighbors` is not 0.
            DatastoreError: Another process writes, or the disk is full; nothing has changed then.
        """
        self.refresh()
        check_pruning(neighbors, distance, seed, self.metric)
        before = self.manifest.index
        check_factory(index or "auto", self.keys.width, self.metric)
        if dry_run:
            return merged(owners_of(self, neighbors, distance, seed, show_progress=show_progress))
        gone = prune_segments(
            self.path,
            _indexing(self.path, index or (before.details["factory"] if before else "auto"), show_progress),
            neighbors=neighbors,
            distance=distance,
            seed=seed,
            segment_entries=segment_entries,
            show_progress=show_progress,
        )
        self.refresh()
        return gone

    def rollback(self, version: int) -> None:
        """Publish what an earlier version held as a new version.

        Raises:
            ConfigError: That version is not kept.
            DatastoreError: Another process writes.
        """
        rollback_to(self.path, version)
        self.refresh()

    def refresh(self) -> None:
        """Show the current version, which others may have written."""
        if Manifest.load(self.path) != self.manifest:
            self._open(verify=True)

    def to_parquet(self, file: str | Path, *, keys: bool = False, show_progress: bool = False) -> None:
        """Export all documents of this version into one Parquet file, a row each; what was removed is left out.

        Columns: `id`, `text`, `metadata` (as JSON), `values` (token ids of the entries), `spans` (where these tokens
        stand in the text, in characters), `positions` and `counts` where some are pruned, and `keys`. What the
        datastore is bound to is in the file's metadata.

        Args:
            file: To make; must not exist.
            keys: Also the keys, so that `from_parquet` needs no model.
            show_progress: Show rate and time left on stderr.

        Raises:
            ConfigError: The file exists, or pyarrow is not installed.
            DatastoreError: An id is not valid UTF-8, which Parquet does not take.
        """
        export_documents(self, Path(file), keys=keys, show_progress=show_progress)

    @classmethod
    def from_parquet(
        cls,
        file: str | Path,
        path: str | Path,
        encoder: Encoder | None = None,
        *,
        index: str = "auto",
        show_progress: bool = True,
    ) -> Datastore:
        """Make a datastore of an export: with its keys where no encoder is given, else with new ones.

        With its keys, it holds the same as the exported version, in segments of the same content, and is bound to the
        same encoder; it appears at `path` in one step. With an encoder it is built as `build` does it, with the metric
        and the type of keys of the exported datastore.

        Args:
            file: That `to_parquet` wrote.
            path: Folder to make.
            encoder: Makes the keys.
            index: "auto", "exact", or a FAISS factory string; see `build_index`.
            show_progress: Show rate and time left on stderr.

        Raises:
            ConfigError: The folder exists, there are no keys and no encoder, or pyarrow is not installed.
            DatastoreCorrupt: The file is damaged, or not one that `to_parquet` wrote.
            IndexError_: The index cannot be built.
            OSError: The disk is full. On this and all other errors nothing is left, but what `build` leaves.
        """
        export, path = Export(file), Path(path)
        manifest = export.manifest
        if encoder is not None:
            kind, dtype = manifest.metric, manifest.keys["dtype"]
            settings = {"index": index, "metric": kind, "key_dtype": dtype, "show_progress": show_progress}
            return cls.build(encoder, export, path, **settings)
        if not export.has_keys:
            raise ConfigError(f"{file} has no keys; name the model that is to make them, or export it with keys")
        check_factory(index, manifest.keys["width"], manifest.metric)

        def index_of(folder: Path, draft: Manifest) -> Part | None:
            version = Version(folder, draft, verify=False)
            return build_index(version.keys, folder / "index", index, name="000001", show_progress=show_progress)

        import_documents(export, path, index_of, show_progress=show_progress)
        return cls(path, verify=False)

    def history(self) -> list[dict[str, Any]]:
        """Return the versions that are kept, the oldest first, as plain values."""
        return [manifest.summary() for manifest in self.manifest.history(self.path)][::-1]


def compact(
    path: str | Path, *, index: str | None = None, segment_entries: int = SEGMENT_ENTRIES, show_progress: bool = False
) -> None:
    """Compact a datastore that is not open, because its index is damaged, say; see `Datastore.compact`."""
    path = Path(path)
    manifest = Manifest.load(path)
    check_factory(index or "auto", manifest.keys["width"], manifest.metric)
    before = manifest.index.details.get("factory") if manifest.index else None
    factory = index or (before if isinstance(before, str) else "auto")
    index_of = _indexing(path, factory, show_progress)
    compact_segments(path, index_of, segment_entries=segment_entries, show_progress=show_progress)


def _indexing(path: Path, factory: str, show_progress: bool) -> Callable[[Manifest], Part | None]:
    """Return what builds the index of a version that is not published yet."""

    def index_of(draft: Manifest) -> Part | None:
        keys, name = Version(path, draft, verify=False).keys, f"{draft.version:06d}"
        return build_index(keys, path / "index", factory, name=name, show_progress=show_progress)

    return index_of
