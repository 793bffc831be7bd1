"""One version of a datastore, opened for reading and searching."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigError, DatastoreCorrupt, ShapeError
from ..evidence import INNER_PRODUCT, Found
from ..index import HOW, Index, open_index
from ..neighbors import Neighbors
from ..text import count
from ._codec import Codec
from ._keys import StoredKeys
from ._manifest import Manifest
from ._segment import Segment
from ._stored import Directory, Place, open_segments

_MEASURED_TOGETHER = 1 << 15  # keys whose distances are computed at once


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an entry comes from.

    Attributes:
        document: Id of its document.
        position: Number of the entry within the document.
        start: Character offset in the document's text at which the stored token begins.
        stop: Offset at which it ends; equal to `start` at the end of the text.
        before: Text before it.
        token: Its own text; "" for the end of the text.
        after: Text after it.
        metadata: Of the document.
    """

    document: str
    position: int
    start: int
    stop: int
    before: str
    token: str
    after: str
    metadata: dict[str, Any]


class Version:
    """Entries and documents of one version, on disk. Entries are numbered; what is deleted leaves its numbers empty.

    Args:
        path: Folder of the datastore.
        manifest: Of the version, which need not be published.
        verify: Compare every file with its checksum; otherwise only with its size.

    Attributes:
        values: Token ids, shape (slots,).
        counts: How many entries each of them stands for, uint32, shape (slots,); None where none is pruned, and each
            stands for itself.
        keys: What the model saw at each entry.
        index: What searches.

    Raises:
        DatastoreError: It is damaged.
    """

    def __init__(self, path: Path, manifest: Manifest, *, verify: bool) -> None:
        self.path = path
        self._show(manifest, verify)

    def _show(self, manifest: Manifest, verify: bool) -> None:
        """Show a version; parts that are open already stay so."""
        known = {segment.name: segment for segment in getattr(self, "_segments", [])}
        for part in manifest.segments:
            if part.name not in known:
                part.check(self.path / "segments", contents=verify)
        segments = open_segments(self.path, manifest, known)
        codec = self._codec_of(manifest, verify)
        dtype = np.uint16 if manifest.values["dtype"] == "uint16" else np.uint32
        values = np.concatenate([np.zeros(0, dtype), *(segment.values for segment in segments)])
        if values.max(initial=0) >= manifest.tokenizer["vocab_size"]:
            raise DatastoreCorrupt(f"{self.path} holds token ids outside its vocabulary; build again")
        counts = None
        if any(segment.counts is not None for segment in segments):
            each = (np.ones(item.entries, np.uint32) if item.counts is None else item.counts for item in segments)
            counts = np.concatenate(list(each))
        shown = self.__dict__.copy()
        for name in ("last_of_document", "followed"):
            self.__dict__.pop(name, None)
        try:
            self.manifest, self.values, self._segments = manifest, values, segments
            self.counts = counts
            self._directory = Directory(segments, manifest)
            width, dtype = manifest.keys["width"], manifest.keys["dtype"]
            self.keys = StoredKeys(segments, self._find_live(), width, dtype, manifest.metric, codec)
            self._starts = self.keys.starts
            before = shown.get("index")
            self.index: Index = open_index(self.keys, self.path / "index", manifest.index, before, verify=verify)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(shown)
            raise

    def _codec_of(self, manifest: Manifest, verify: bool) -> Codec | None:
        """Return the codec of a version; one that is open already stays so."""
        if manifest.codec is None:
            return None
        if "keys" in self.__dict__ and self.manifest.codec == manifest.codec:
            return self.keys.codec
        return Codec.open(self.path / "codec", manifest.codec, manifest.keys, verify=verify)

    def _find_live(self) -> npt.NDArray[np.bool_] | None:
        if self.manifest.slots == self.manifest.entries:
            return None
        live = self._directory.live()
        if live.sum() != self.manifest.entries:
            raise DatastoreCorrupt(f"{self.path} does not have as many deleted entries as its manifest says; roll back")
        return live

    def __len__(self) -> int:
        return self.manifest.entries

    @property
    def slots(self) -> int:
        """Entry numbers in use, those of deleted entries among them: every number is below it."""
        return len(self.values)

    @property
    def live(self) -> npt.NDArray[np.bool_] | None:
        """Whether an entry is not deleted, shape (slots,); None where none is deleted."""
        return self.keys.live

    @property
    def width(self) -> int:
        """Numbers in a key of the model, and in a query; compressed keys have fewer (`keys.width`)."""
        return self.manifest.encoder_keys["width"]

    @property
    def metric(self) -> str:
        """What distances are: "squared_l2", or "inner_product" for negative inner products."""
        return self.manifest.metric

    def search(
        self, queries: npt.NDArray[np.float32], k: int, exclude: npt.NDArray[np.int64] | None = None
    ) -> Neighbors:
        """Find the nearest entries.

        Args:
            queries: float32, shape (n, width).
            k: Neighbors a query.
            exclude: Range of entries [from, to) that each query must not find, int64, shape (n, 2); None excludes
                nothing. `document_range` gives the range of a document.

        Returns:
            Neighbors of shape (n, k); fewer are marked absent.

        Raises:
            ConfigError: k is larger than the datastore.
            ShapeError: Queries have another width.
        """
        self.check_search(queries, k)
        queries = self.project(queries)
        if exclude is None or not len(queries):
            return self._checked(self.index.search(queries, k, (0, 0))) if len(queries) else Neighbors.empty(0, k)
        ranges, group = np.unique(exclude, axis=0, return_inverse=True)
        result = Neighbors.empty(len(queries), k)
        for number, (first, stop) in enumerate(ranges):
            mine = np.flatnonzero(group.ravel() == number)
            found = self._checked(self.index.search(queries[mine], k, (int(first), int(stop))))
            for whole, part in zip(result, found, strict=True):
                whole[mine] = part
        return result

    def check_search(self, queries: npt.NDArray[np.float32], k: int) -> None:
        """Raise what `search` raises for such queries."""
        if not 1 <= k <= len(self):
            raise ConfigError(f"k is {k}; expected 1 to {len(self)}, the number of entries in {self.path}")
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ShapeError(f"queries have shape {queries.shape}; expected (n, {self.width})")
        if not np.isfinite(queries).all():
            raise ShapeError("queries hold NaN or infinite numbers; check the model's weights and its dtype")

    def project(self, queries: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return queries as an index compares them with stored keys: in the space of compressed ones; see `Codec`.

        Args:
            queries: Finite, shape (n, width).

        Returns:
            float32, shape (n, `keys.width`).
        """
        queries = np.ascontiguousarray(queries, np.float32)
        return queries if self.keys.codec is None else self.keys.codec.project(torch.from_numpy(queries)).numpy()

    def distances(
        self, queries: npt.NDArray[np.float32], rows: npt.NDArray[np.int64], entries: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return the distance of each query row to one entry, by the datastore's metric.

        Args:
            queries: float32, shape (n, width).
            rows: Numbers of queries, shape (pairs,).
            entries: Shape (pairs,).

        Returns:
            float32, shape (pairs,).
        """
        asked = torch.from_numpy(self.project(queries))
        result = np.empty(len(rows), np.float32)
        for start in range(0, len(rows), _MEASURED_TOGETHER):
            part = slice(start, start + _MEASURED_TOGETHER)
            keys, mine = self.keys.gather_keys(entries[part]), asked[torch.from_numpy(rows[part])]
            if self.metric == INNER_PRODUCT:
                result[part] = -torch.einsum("nw,nw->n", keys, mine).numpy()
            else:
                keys -= mine
                result[part] = torch.einsum("nw,nw->n", keys, keys).numpy()
        return result

    def _checked(self, found: Neighbors) -> Neighbors:
        if found.entries.max(initial=0) >= max(1, self.slots):
            raise DatastoreCorrupt(f"the index of {self.path} names entries that do not exist; rebuild it {HOW}")
        return found

    def lookup(self, queries: npt.NDArray[np.float32], k: int, exclude: npt.NDArray[np.int64] | None = None) -> Found:
        """Find the nearest entries with their values, as tensors of shape (n, k); see `search`."""
        return self.with_values(self.search(queries, k, exclude))

    def with_values(self, found: Neighbors) -> Found:
        """Return neighbors with their values, as tensors."""
        tokens = self.values[found.entries].astype(np.int64)
        distances, present = torch.from_numpy(found.distances), torch.from_numpy(found.present)
        entries, log_counts = torch.from_numpy(found.entries), None
        if self.counts is not None:
            log_counts = torch.from_numpy(np.log(self.counts[found.entries], dtype=np.float32))
        return Found(distances, torch.from_numpy(tokens), present, entries, log_counts=log_counts)

    def statistics(self) -> Tensor:
        """Return log(1 + frequency) and log(1 + fertility) of every token among the stored values.

        Frequency is how often another value follows it in its document, fertility how many different ones do. What a
        document ends with is followed by nothing, and what it starts with (the start token, or where there is none its
        first token) is a value of no entry: neither is counted there. In a pruned datastore, entries count as often as
        they stand for others, but what followed those others is not known any more: fertility is then at least so much.

        Returns:
            float32, shape (vocabulary, 2).
        """
        size = self.manifest.tokenizer["vocab_size"]
        live = np.ones(self.slots, bool) if self.live is None else self.live
        # of all that a document's last entry stands for, one is followed by nothing
        followers = (1 if self.counts is None else self.counts) - self.last_of_document
        frequency = np.bincount(self.values[live], followers[live], minlength=size)
        places = np.flatnonzero(self.followed & live)
        before, after = self.values[places].astype(np.int64), self.values[places + 1].astype(np.int64)
        pairs = np.unique(before * size + after)
        counts = np.stack([frequency, np.bincount(pairs // size, minlength=size)], axis=1)
        return torch.from_numpy(np.log1p(counts).astype(np.float32))

    def document_range(self, text: str) -> tuple[int, int]:
        """Return the entries [from, to) of the document with this very text; (0, 0) if it is not stored."""
        place = self._directory.with_text(text)
        return (0, 0) if place is None else self._range(place)

    def _range(self, place: Place) -> tuple[int, int]:
        rows, start = self._segments[place.segment].rows(place.number), int(self._starts[place.segment])
        return start + rows.start, start + rows.stop

    def provenance(self, entry: int, context: int = 60) -> Provenance:
        """Tell where an entry comes from, with `context` characters on either side.

        Raises:
            ConfigError: There is no such entry, or it is deleted.
        """
        if not 0 <= entry < self.slots:
            raise ConfigError(f"entry is {entry}; expected 0 to {self.slots - 1}")
        if self.live is not None and not self.live[entry]:
            raise ConfigError(f"entry {entry} is deleted")
        number = int(np.searchsorted(self._starts, entry, side="right")) - 1
        segment, row = self._segments[number], entry - int(self._starts[number])
        place = int(np.searchsorted(segment.entry_starts, row, side="right")) - 1
        document = segment.document(place)
        text = document["text"]
        start, stop = (int(value) for value in segment.spans[row])
        if entry and self.followed[entry - 1]:
            start = min(start, int(segment.spans[row - 1, 1]))  # white space that the tokenizer left out
        return Provenance(
            document=document["id"],
            position=int(segment.pruned(place).positions[row - segment.entry_starts[place]]),
            start=start,
            stop=stop,
            before=text[max(0, start - context) : start],
            token=text[start:stop],
            after=text[stop : stop + context],
            metadata=document["metadata"],
        )

    def documents(self) -> Iterator[dict[str, Any]]:
        """Yield id, sha256, metadata, text and `entries` [from, to) of every document."""
        for place in self._directory:
            yield {**self._directory.document(place), "entries": self._range(place)}

    def live_documents(self) -> Iterator[tuple[Segment, npt.NDArray[np.int64]]]:
        """Yield every segment with the numbers of its documents that are not deleted."""
        for segment, deleted in zip(self._segments, self._directory.deleted, strict=True):
            yield segment, np.flatnonzero(~deleted)

    def entry_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the entries [from, to) of every document, in order."""
        for place in self._directory:
            yield self._range(place)

    @cached_property
    def last_of_document(self) -> npt.NDArray[np.bool_]:
        """Whether an entry is the last of its document, deleted or not, shape (slots,)."""
        result = np.zeros(self.slots, bool)
        for start, segment in zip(self._starts, self._segments, strict=False):
            first, stop = segment.entry_starts[:-1], segment.entry_starts[1:]
            result[start + stop[first < stop] - 1] = True
        return result

    @cached_property
    def followed(self) -> npt.NDArray[np.bool_]:
        """Whether the next number is that of the entry of the next token in the same document, deleted or not, shape
        (slots,); False also where that was merged into another one.
        """
        result = ~self.last_of_document
        for start, segment in zip(self._starts, self._segments, strict=False):
            if segment.counts is not None and segment.entries:
                result[start : start + segment.entries - 1] &= np.diff(segment.positions.astype(np.int64)) == 1
        return result

    def positions(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the places of a document's entries [from, to) in its sequence, rising: all, where it is not pruned."""
        if first >= stop:
            return np.zeros(0, np.int64)  # also behind the last segment
        number = int(np.searchsorted(self._starts, first, side="right")) - 1
        start = int(self._starts[number])
        return self._segments[number].positions[first - start : stop - start].astype(np.int64)

    def info(self) -> dict[str, Any]:
        """Return numbers, sizes and settings, as plain values."""
        manifest = self.manifest
        live = True if self.live is None else self.live
        return {
            "path": str(self.path),
            "version": manifest.version,
            "created": manifest.created,
            "entries": len(self),
            "documents": manifest.documents,
            "bytes": sum(manifest.files.values()),
            "segments": len(manifest.segments),
            "deleted": manifest.slots - manifest.entries,
            "merged": 0 if self.counts is None else int(self.counts.sum(where=live)) - len(self),
            "complete": manifest.complete,
            "encoder": manifest.encoder,
            "tokenizer": manifest.tokenizer,
            "windows": manifest.windows,
            "metric": manifest.metric,
            "keys": manifest.keys,
            "encoder_keys": manifest.encoder_keys,
            "values": manifest.values,
            "corpus": manifest.corpus,
            "index": manifest.index.details if manifest.index else {"kind": "exact"},
        }

    def __repr__(self) -> str:
        entries, documents = count(len(self), "entry", "entries"), count(self.manifest.documents, "document")
        return f"Datastore({str(self.path)!r}, {entries}, {documents})"
