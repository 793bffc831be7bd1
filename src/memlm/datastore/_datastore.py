"""A datastore opened for reading and searching."""

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
from ..evidence import METRICS, SQUARED_L2, Found
from ..index import Index, build_index, check_factory, open_index
from ..neighbors import Neighbors
from ..text import count
from ._build import Encoder, build_segments
from ._manifest import Manifest, Part
from ._segment import Segment, text_sha256


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


class Datastore:
    """Entries (key, value) of every token of a corpus, on disk, with the documents they come from.

    Open one with `Datastore(path)`, make one with `Datastore.build`.

    Args:
        path: Folder of the datastore.
        verify: Compare every file with its checksum; otherwise only with its size.

    Raises:
        DatastoreError: There is none, it is damaged, or it was written by a newer memlm.
    """

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        for part in self.manifest.segments:
            part.check(self.path / "segments", contents=verify)
        settings = {"key_dtype": self.key_dtype, "key_width": self.width, "value_dtype": self.manifest.values["dtype"]}
        self._segments = [Segment(self.path / "segments", part, **settings) for part in self.manifest.segments]
        self._starts = np.cumsum([0] + [segment.entries for segment in self._segments])  # first entry of each segment
        self.values = np.concatenate([segment.values for segment in self._segments])
        if self.values.max() >= self.manifest.tokenizer["vocab_size"]:
            raise DatastoreCorrupt(f"{self.path} holds token ids outside its vocabulary; build again")
        self.index: Index = open_index(self, self.path / "index", self.manifest.index, verify=verify)

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
        segment_entries: int = 1 << 20,
        show_progress: bool = True,
    ) -> Datastore:
        """Store every token of a corpus: what the model saw before it, and which token it was.

        Args:
            encoder: A `LanguageModel`.
            source: Documents; anything that `Corpus` takes.
            path: Folder to make.
            index: "auto", "exact", or a FAISS factory string; see `build_index`.
            metric: "squared_l2", or "inner_product" for TRIME; distances are then negative inner products.
            key_dtype: "float16" or "bfloat16".
            segment_entries: Entries a segment, about; a document is never divided. Bounds the text held in memory.
            show_progress: Show rate and time left on stderr.

        Raises:
            ConfigError: The metric or the key type is not known.
            CorpusError: No text, or unreadable text.
            DatastoreError: The folder is taken, the disk is full, keys are not finite, or the index cannot be built. In
                the last case, and when interrupted while the index is built, a datastore with exact search is left.
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
        """Build another search index and publish it as a new version of the datastore."""
        name = f"{self.manifest.version + 1:06d}"
        part = build_index(self, self.path / "index", factory, name=name, show_progress=show_progress)
        if part is None and self.manifest.index is None:
            return
        manifest = self.manifest.with_index(part)
        opened = open_index(self, self.path / "index", part, verify=False)
        manifest.publish(self.path)
        self.manifest, self.index = manifest, opened

    def __len__(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        """Numbers in a key."""
        return self.manifest.keys["width"]

    @property
    def key_dtype(self) -> str:
        """Type in which keys are stored."""
        return self.manifest.keys["dtype"]

    @property
    def metric(self) -> str:
        """What distances are: "squared_l2", or "inner_product" for negative inner products."""
        return self.manifest.metric

    def key_blocks(self, rows: int = 1 << 16) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield (first entry, keys as float32 of shape (at most `rows`, width)) over the whole datastore."""
        for start, segment in zip(self._starts, self._segments, strict=False):
            for first in range(0, segment.entries, rows):
                yield int(start) + first, segment.keys[first : first + rows].float().numpy()

    def gather_keys(self, entries: npt.NDArray[np.int64]) -> Tensor:
        """Return the stored keys of some entries, in the type of storage, shape (n, width)."""
        if len(self._segments) == 1:
            return self._segments[0].keys[torch.from_numpy(entries)]
        result = torch.empty((len(entries), self.width), dtype=self._segments[0].keys.dtype)
        owners = np.searchsorted(self._starts, entries, side="right") - 1
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            rows = torch.from_numpy(entries[mine] - self._starts[number])
            result[torch.from_numpy(mine)] = self._segments[number].keys[rows]
        return result

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
        queries = np.ascontiguousarray(queries, np.float32)
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

    def _checked(self, found: Neighbors) -> Neighbors:
        if found.entries.max(initial=0) >= len(self):
            raise DatastoreCorrupt(f"the index of {self.path} names entries that do not exist; rebuild it")
        return found

    def lookup(self, queries: npt.NDArray[np.float32], k: int, exclude: npt.NDArray[np.int64] | None = None) -> Found:
        """Find the nearest entries with their values, as tensors of shape (n, k); see `search`."""
        return self.with_values(self.search(queries, k, exclude))

    def with_values(self, found: Neighbors) -> Found:
        """Return neighbors with their values, as tensors."""
        tokens = self.values[found.entries].astype(np.int64)
        distances, present = torch.from_numpy(found.distances), torch.from_numpy(found.present)
        return Found(distances, torch.from_numpy(tokens), present, torch.from_numpy(found.entries))

    def statistics(self) -> Tensor:
        """Return log(1 + frequency) and log(1 + fertility) of every token among the stored values.

        Frequency is how often another value follows it in its document, fertility how many different ones do. What a
        document ends with is followed by nothing, and what it starts with (the start token, or where there is none its
        first token) is a value of no entry: neither is counted there.

        Returns:
            float32, shape (vocabulary, 2).
        """
        size = self.manifest.tokenizer["vocab_size"]
        places = np.flatnonzero(~self.last_of_document)
        before, after = self.values[places].astype(np.int64), self.values[places + 1].astype(np.int64)
        pairs = np.unique(before * size + after)
        counts = np.stack([np.bincount(before, minlength=size), np.bincount(pairs // size, minlength=size)], axis=1)
        return torch.from_numpy(np.log1p(counts).astype(np.float32))

    def document_range(self, text: str) -> tuple[int, int]:
        """Return the entries [from, to) of the document with this very text; (0, 0) if it is not stored."""
        name = text_sha256(text)
        for start, segment in zip(self._starts, self._segments, strict=False):
            number = segment.content.get(name)
            if number is not None:
                return int(start + segment.entry_starts[number]), int(start + segment.entry_starts[number + 1])
        return 0, 0

    def provenance(self, entry: int, context: int = 60) -> Provenance:
        """Tell where an entry comes from, with `context` characters on either side.

        Raises:
            ConfigError: There is no such entry.
        """
        if not 0 <= entry < len(self):
            raise ConfigError(f"entry is {entry}; expected 0 to {len(self) - 1}")
        number = int(np.searchsorted(self._starts, entry, side="right")) - 1
        segment, row = self._segments[number], entry - int(self._starts[number])
        place = int(np.searchsorted(segment.entry_starts, row, side="right")) - 1
        document = segment.document(place)
        text = document["text"]
        start, stop = (int(value) for value in segment.spans[row])
        if row > segment.entry_starts[place]:
            start = min(start, int(segment.spans[row - 1, 1]))  # white space that the tokenizer left out
        return Provenance(
            document=document["id"],
            position=row - int(segment.entry_starts[place]),
            start=start,
            stop=stop,
            before=text[max(0, start - context) : start],
            token=text[start:stop],
            after=text[stop : stop + context],
            metadata=document["metadata"],
        )

    def documents(self) -> Iterator[dict[str, Any]]:
        """Yield id, sha256, metadata, text and `entries` [from, to) of every document."""
        for start, segment in zip(self._starts, self._segments, strict=False):
            for number in range(segment.documents):
                first, stop = segment.entry_starts[number : number + 2] + start
                yield {**segment.document(number), "entries": (int(first), int(stop))}

    def entry_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the entries [from, to) of every document, in order."""
        for start, segment in zip(self._starts, self._segments, strict=False):
            for first, stop in zip(segment.entry_starts, segment.entry_starts[1:], strict=False):
                yield int(start + first), int(start + stop)

    @cached_property
    def last_of_document(self) -> npt.NDArray[np.bool_]:
        """Whether an entry is the last of its document, shape (entries,)."""
        result = np.zeros(len(self), bool)
        result[[stop - 1 for first, stop in self.entry_ranges() if first < stop]] = True
        return result

    def info(self) -> dict[str, Any]:
        """Return numbers, sizes and settings, as plain values."""
        manifest = self.manifest
        parts: list[Part] = [*manifest.segments, *([manifest.index] if manifest.index else [])]
        return {
            "path": str(self.path),
            "version": manifest.version,
            "created": manifest.created,
            "entries": len(self),
            "documents": manifest.documents,
            "bytes": sum(file["bytes"] for part in parts for file in part.files.values()),
            "segments": len(manifest.segments),
            "encoder": manifest.encoder,
            "tokenizer": manifest.tokenizer,
            "windows": manifest.windows,
            "metric": manifest.metric,
            "keys": manifest.keys,
            "values": manifest.values,
            "corpus": manifest.corpus,
            "index": manifest.index.details if manifest.index else {"kind": "exact"},
        }

    def __repr__(self) -> str:
        entries, documents = count(len(self), "entry", "entries"), count(self.manifest.documents, "document")
        return f"Datastore({str(self.path)!r}, {entries}, {documents})"
