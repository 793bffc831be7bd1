"""Segments: the immutable parts of a datastore, each a folder with keys, entries and documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..documents import Document
from ..errors import CorpusError, DatastoreCorrupt, KeyOverflow, ModelError, ShapeError
from ..tensors import Layout, create_tensors, map_bytes, open_tensors
from ._part import Part
from ._pruned import Pruned

STORED_TYPES = {"float16": ("F16", torch.float16), "bfloat16": ("BF16", torch.bfloat16), "int8": ("I8", torch.int8)}


def value_type(vocab_size: int) -> str:
    """Return the smallest unsigned type (of 2 or 4 bytes) that holds every token id."""
    return "U16" if vocab_size <= 1 << 16 else "U32"


class Stored(NamedTuple):
    """A document as a segment holds it, less its keys.

    Attributes:
        line: Its JSON, ended by a line feed.
        id_sha256: Digest of its id, 32 bytes.
        text_sha256: Digest of its text, 32 bytes.
        values: Token ids of its entries, shape (entries,).
        spans: Character offsets of its entries, shape (entries, 2).
        pruned: Which of its entries these are, and what was merged into them.
    """

    line: bytes
    id_sha256: bytes
    text_sha256: bytes
    values: npt.NDArray[Any]
    spans: npt.NDArray[Any]
    pruned: Pruned

    @classmethod
    def of(cls, item: Any, vocab_size: int) -> Stored:
        """Return a tokenized document (`document`, `ids`, `spans`) in this form.

        Raises:
            CorpusError: Its metadata is no JSON.
            ModelError: Token ids are not below `vocab_size`.
        """
        document, ids = item.document, item.ids
        if len(ids) > 1 and (ids.min() < 0 or ids.max() >= vocab_size):
            raise ModelError(
                f"the tokens of {document.id!r} have ids from {ids.min()} to {ids.max()}; expected 0 to "
                f"{vocab_size - 1}: the tokenizer does not belong to this model"
            )
        return cls.with_entries(document, ids[1:], item.spans[1:])

    @classmethod
    def with_entries(
        cls, document: Document, values: npt.NDArray[Any], spans: npt.NDArray[Any], pruned: Pruned | None = None
    ) -> Stored:
        """Return a document with the values and spans of its entries in this form; raises CorpusError as `of`.

        Args:
            document: The document.
            values: Token ids, shape (entries,).
            spans: Character offsets, shape (entries, 2).
            pruned: What pruning left of its entries; None if it was not pruned.
        """
        digest = sha256(document.text)
        row = {"id": document.id, "sha256": digest.hex(), "metadata": plain_metadata(document)}
        line = json.dumps({**row, "text": document.text}, ensure_ascii=True).encode() + b"\n"
        pruned = Pruned.none(len(values)) if pruned is None else pruned
        return cls(line, sha256(document.id), digest, values, spans, pruned)


class SegmentWriter:
    """Writes one segment: first the documents and values, which give it its size, then keys in any order.

    Args:
        folder: Of the segment; must not exist.
        documents: In order.
        key_dtype: "float16", "bfloat16" or, of compressed keys, "int8".
        key_width: Numbers in a stored key.
        vocab_size: Token ids are below it.
    """

    def __init__(
        self, folder: Path, documents: Sequence[Stored], *, key_dtype: str, key_width: int, vocab_size: int
    ) -> None:
        folder.mkdir(parents=True)
        self.key_dtype = key_dtype
        self.documents = len(documents)
        counts = [len(item.values) for item in documents]
        self.entries = sum(counts)
        (folder / "documents.jsonl").write_bytes(b"".join(item.line for item in documents))
        layout: Layout = {
            # widest type first, so that every tensor is aligned
            "entry_starts": ("I64", (self.documents + 1,)),
            "text_starts": ("I64", (self.documents + 1,)),
            "spans": ("U32", (self.entries, 2)),
            "values": (value_type(vocab_size), (self.entries,)),
            "ids": ("U8", (self.documents, 32)),
            "texts": ("U8", (self.documents, 32)),
        }
        if not all(item.pruned.whole for item in documents):
            layout |= {"positions": ("U32", (self.entries,)), "counts": ("U32", (self.entries,))}
        maps = create_tensors(folder / "entries.safetensors", layout)
        maps["entry_starts"][:] = np.cumsum([0, *counts])
        maps["text_starts"][:] = np.cumsum([0, *(len(item.line) for item in documents)])
        for number, (item, start) in enumerate(zip(documents, maps["entry_starts"], strict=False)):
            rows = slice(start, start + len(item.values))
            maps["values"][rows] = item.values
            maps["spans"][rows] = item.spans
            if "counts" in maps:
                maps["positions"][rows], maps["counts"][rows] = item.pruned
            maps["ids"][number] = np.frombuffer(item.id_sha256, np.uint8)
            maps["texts"][number] = np.frombuffer(item.text_sha256, np.uint8)
        for array in maps.values():
            if isinstance(array, np.memmap):
                array.flush()
        kind, dtype = STORED_TYPES[key_dtype]
        self._map = create_tensors(folder / "keys.safetensors", {"keys": (kind, (self.entries, key_width))})["keys"]
        self._keys = torch.from_numpy(self._map).view(dtype)
        self._written = np.zeros(self.entries, bool)

    def write_keys(self, rows: Tensor, keys: Tensor) -> None:
        """Store keys at their rows; rows int64 (n,), keys any float type or codes (n, width).

        Raises:
            KeyOverflow: A key is not finite, as computed or in the type of storage.
            ShapeError: Keys have another width, or another number than rows.
        """
        if keys.shape != (len(rows), self._keys.shape[1]):
            raise ShapeError(f"keys have shape {tuple(keys.shape)}; expected ({len(rows)}, {self._keys.shape[1]})")
        stored = keys.to("cpu", self._keys.dtype)
        if not stored.isfinite().all():
            if not keys.isfinite().all():
                raise KeyOverflow("the model gave keys that are NaN or infinite; check its weights and its dtype")
            advice = "use key type bfloat16" if self.key_dtype == "float16" else "check the model's weights"
            raise KeyOverflow(f"keys up to {keys.abs().max():.3g} overflow {self.key_dtype}; {advice}")
        self._keys[rows] = stored
        self._written[rows.numpy()] = True

    def finish(self) -> dict[str, int]:
        """Write everything out and return the segment's details for the manifest.

        Raises:
            ShapeError: Some entry has no key.
        """
        if not self._written.all():
            raise ShapeError(f"{int((~self._written).sum())} of {self.entries} entries got no key from the encoder")
        if isinstance(self._map, np.memmap):
            self._map.flush()
        return {"entries": self.entries, "documents": self.documents}


def plain_metadata(document: Any) -> dict[str, Any]:
    """Return a document's metadata as JSON gives it back; dates and the like become text.

    Raises:
        CorpusError: It is no JSON.
    """
    try:
        return json.loads(json.dumps(dict(document.metadata), default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise CorpusError(f"the metadata of {document.id!r} cannot be stored as JSON: {error}") from error


def sha256(text: str) -> bytes:
    """Return the digest of a text or an id, 32 bytes."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class Segment:
    """A segment opened for reading. It goes on to be readable when its files are removed.

    Attributes:
        keys: float16, bfloat16 or int8, shape (entries, width), mapped; compressed ones as codes.
        values: Unsigned, shape (entries,), mapped.
        spans: Uint32, shape (entries, 2), mapped: character offsets in the document's text.
        entry_starts: Int64, shape (documents + 1,): first entry of every document.
        ids: Digests of the documents' ids, uint8, shape (documents, 32).
        texts: Digests of their texts, uint8, shape (documents, 32).
        positions: Of the entries in their documents' sequences, uint32, shape (entries,); see `Pruned`.
        counts: How many entries each of them stands for, uint32, shape (entries,), mapped; None where none is pruned,
            and each stands for itself.
    """

    def __init__(self, folder: Path, part: Part, *, key_dtype: str, key_width: int, value_dtype: str) -> None:
        self.name = part.name
        self.folder = folder / part.name
        self.entries: int = part.details["entries"]
        self.documents: int = part.details["documents"]
        arrays = open_tensors(self.folder / "entries.safetensors") | open_tensors(self.folder / "keys.safetensors")
        self._lines = map_bytes(self.folder / "documents.jsonl")
        kind = "int16" if key_dtype == "bfloat16" else key_dtype  # NumPy lacks bfloat16
        expected = {
            "values": (value_dtype, (self.entries,)),
            "spans": ("uint32", (self.entries, 2)),
            "entry_starts": ("int64", (self.documents + 1,)),
            "text_starts": ("int64", (self.documents + 1,)),
            "ids": ("uint8", (self.documents, 32)),
            "texts": ("uint8", (self.documents, 32)),
            "keys": (kind, (self.entries, key_width)),
        }
        if "counts" in arrays or "positions" in arrays:
            expected |= {"positions": ("uint32", (self.entries,)), "counts": ("uint32", (self.entries,))}
        if {name: (array.dtype.name, array.shape) for name, array in arrays.items()} != expected:
            raise DatastoreCorrupt(f"{self.folder} holds other tensors than its manifest says; build again")
        ends = {"entry_starts": self.entries, "text_starts": len(self._lines)}
        for name, end in ends.items():
            starts = arrays[name]
            if starts[0] != 0 or starts[-1] != end or (np.diff(starts) < 0).any():
                raise DatastoreCorrupt(f"{self.folder} has {name} that do not rise from 0 to {end}; build again")
        self.keys: Tensor = torch.from_numpy(arrays["keys"]).view(STORED_TYPES[key_dtype][1])
        self.values: np.ndarray = arrays["values"]
        self.spans: np.ndarray = arrays["spans"]
        self.entry_starts: np.ndarray = np.asarray(arrays["entry_starts"])
        self.ids: np.ndarray = arrays["ids"]
        self.texts: np.ndarray = arrays["texts"]
        self._text_starts: np.ndarray = np.asarray(arrays["text_starts"])
        self.counts: np.ndarray | None = arrays.get("counts")
        self._positions: np.ndarray | None = arrays.get("positions")
        if self.counts is not None and not self.counts.all():
            raise DatastoreCorrupt(f"{self.folder} has entries that stand for none; build again")

    @property
    def positions(self) -> npt.NDArray[np.uint32]:
        """See the class."""
        if self._positions is not None:
            return self._positions
        starts = np.repeat(self.entry_starts[:-1], np.diff(self.entry_starts))
        return (np.arange(self.entries) - starts).astype(np.uint32)

    @cached_property
    def _by_id(self) -> _Digests:
        return _Digests(self.ids)

    @cached_property
    def _by_text(self) -> _Digests:
        return _Digests(self.texts)

    def with_id(self, digest: bytes) -> list[int]:
        """Return the numbers of the documents whose id has this digest."""
        return self._by_id.find(digest)

    def with_text(self, digest: bytes) -> list[int]:
        """Return the numbers of the documents whose text has this digest."""
        return self._by_text.find(digest)

    def line(self, number: int) -> bytes:
        """Return a document's JSON as it is stored."""
        return self._lines[self._text_starts[number] : self._text_starts[number + 1]].tobytes()

    def document(self, number: int) -> dict[str, Any]:
        """Return a document's id, sha256, metadata and text."""
        try:
            document = json.loads(self.line(number))
            named = all(isinstance(document[name], str) for name in ("id", "sha256", "text"))
            if named and isinstance(document["metadata"], dict):
                return document
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise DatastoreCorrupt(f"{self.folder / 'documents.jsonl'} holds a line that is no document; build again")

    def stored(self, number: int, counts: npt.NDArray[np.uint32] | None = None) -> Stored:
        """Return a document in the form in which it can be written into another segment.

        Args:
            number: Of the document.
            counts: How many entries each entry of this segment shall stand for, shape (entries,); 0 leaves it out. None
                leaves all as they are.
        """
        rows, pruned = self.rows(number), self.pruned(number)
        values, spans = self.values[rows], self.spans[rows]
        if counts is not None:
            left = counts[rows] > 0
            spans = np.array(spans)
            # the white space that a tokenizer leaves out is found behind the token before, while that is there
            alone = left[1:] & ~left[:-1] & (np.diff(pruned.positions.astype(np.int64)) == 1)
            spans[1:, 0] = np.where(alone, np.minimum(spans[1:, 0], spans[:-1, 1]), spans[1:, 0])
            pruned = Pruned(pruned.positions[left], counts[rows][left])
            values, spans = values[left], spans[left]
        ids, texts = self.ids[number].tobytes(), self.texts[number].tobytes()
        return Stored(self.line(number), ids, texts, values, spans, pruned)

    def pruned(self, number: int) -> Pruned:
        """Return which of a document's entries are left, and what each of them stands for."""
        rows = self.rows(number)
        if self.counts is None or self._positions is None:
            return Pruned.none(rows.stop - rows.start)
        return Pruned(self._positions[rows], self.counts[rows])

    def rows(self, number: int) -> slice:
        """Return the entries of a document."""
        return slice(int(self.entry_starts[number]), int(self.entry_starts[number + 1]))


class _Digests:
    """Finds digests among many: by their first eight bytes, sorted, and then by all of them."""

    def __init__(self, digests: npt.NDArray[np.uint8]) -> None:
        heads = np.ascontiguousarray(digests[:, :8]).view(np.uint64).ravel()
        self._digests = digests
        self._order = heads.argsort(kind="stable")
        self._heads = heads[self._order]

    def find(self, digest: bytes) -> list[int]:
        """Return the numbers at which it stands, rising."""
        head = np.frombuffer(digest[:8], np.uint64)
        first, stop = (int(np.searchsorted(self._heads, head, side)[0]) for side in ("left", "right"))
        return [int(number) for number in self._order[first:stop] if self._digests[number].tobytes() == digest]
