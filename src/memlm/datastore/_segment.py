"""Segments: the immutable parts of a datastore, each a folder with keys, entries and documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CorpusError, DatastoreCorrupt, KeyOverflow, ModelError, ShapeError
from ..tensors import Layout, create_tensors, open_tensors
from ._manifest import Part

KEY_TYPES = {"float16": ("F16", torch.float16), "bfloat16": ("BF16", torch.bfloat16)}


def value_type(vocab_size: int) -> str:
    """Return the smallest unsigned type (of 2 or 4 bytes) that holds every token id."""
    return "U16" if vocab_size <= 1 << 16 else "U32"


class SegmentWriter:
    """Writes one segment: first the documents and values, which give it its size, then keys in any order.

    Args:
        folder: Of the segment; must not exist.
        documents: Tokenized documents, each with `document`, `ids` and `spans`.
        key_dtype: "float16" or "bfloat16".
        key_width: Numbers in a key.
        vocab_size: Token ids must be below it.
    """

    def __init__(
        self, folder: Path, documents: Sequence[Any], *, key_dtype: str, key_width: int, vocab_size: int
    ) -> None:
        folder.mkdir(parents=True)
        self.key_dtype = key_dtype
        self.documents = len(documents)
        counts = [max(0, len(item.ids) - 1) for item in documents]
        self.entries = sum(counts)
        text_starts = _write_documents(folder / "documents.jsonl", documents)
        values = value_type(vocab_size)
        layout: Layout = {
            # widest type first, so that every tensor is aligned
            "entry_starts": ("I64", (self.documents + 1,)),
            "text_starts": ("I64", (self.documents + 1,)),
            "spans": ("U32", (self.entries, 2)),
            "values": (values, (self.entries,)),
        }
        maps = create_tensors(folder / "entries.safetensors", layout)
        maps["entry_starts"][:] = np.concatenate([[0], np.cumsum(counts)])
        maps["text_starts"][:] = text_starts
        for item, start, count in zip(documents, maps["entry_starts"], counts, strict=False):
            if count and (item.ids.min() < 0 or item.ids.max() >= vocab_size):
                raise ModelError(
                    f"the tokens of {item.document.id!r} have ids from {item.ids.min()} to {item.ids.max()}; expected "
                    f"0 to {vocab_size - 1}: the tokenizer does not belong to this model"
                )
            maps["values"][start : start + count] = item.ids[1:]
            maps["spans"][start : start + count] = item.spans[1:]
        for array in maps.values():
            if isinstance(array, np.memmap):
                array.flush()
        kind, self._dtype = KEY_TYPES[key_dtype]
        self._keys = create_tensors(folder / "keys.safetensors", {"keys": (kind, (self.entries, key_width))})["keys"]
        self._written = np.zeros(self.entries, bool)

    def write_keys(self, rows: Tensor, keys: Tensor) -> None:
        """Store keys at their rows; rows int64 (n,), keys any float type (n, width).

        Raises:
            KeyOverflow: A key is not finite, as computed or in the type of storage.
            ShapeError: Keys have another width, or another number than rows.
        """
        if keys.shape != (len(rows), self._keys.shape[1]):
            raise ShapeError(f"keys have shape {tuple(keys.shape)}; expected ({len(rows)}, {self._keys.shape[1]})")
        stored = keys.to("cpu", self._dtype)
        if not stored.isfinite().all():
            if not keys.isfinite().all():
                raise KeyOverflow("the model gave keys that are NaN or infinite; check its weights and its dtype")
            advice = "use key type bfloat16" if self.key_dtype == "float16" else "check the model's weights"
            raise KeyOverflow(f"keys up to {keys.abs().max():.3g} overflow {self.key_dtype}; {advice}")
        self._keys[rows.numpy()] = stored.view(torch.int16).numpy().view(self._keys.dtype)
        self._written[rows.numpy()] = True

    def finish(self) -> dict[str, int]:
        """Write everything out and return the segment's details for the manifest.

        Raises:
            ShapeError: Some entry has no key.
        """
        if not self._written.all():
            raise ShapeError(f"{int((~self._written).sum())} of {self.entries} entries got no key from the encoder")
        if isinstance(self._keys, np.memmap):
            self._keys.flush()
        return {"entries": self.entries, "documents": self.documents}


def _write_documents(path: Path, documents: Sequence[Any]) -> np.ndarray:
    """Write one JSON line a document; return where each starts, and the end."""
    starts = [0]
    with path.open("xb") as file:
        for item in documents:
            text = item.document.text
            row = {"id": item.document.id, "sha256": text_sha256(text), "metadata": dict(item.document.metadata)}
            try:  # dates and the like become text
                line = json.dumps({**row, "text": text}, ensure_ascii=True, default=str)
            except (TypeError, ValueError) as error:
                raise CorpusError(f"the metadata of {item.document.id!r} cannot be stored as JSON: {error}") from error
            file.write(line.encode() + b"\n")
            starts.append(file.tell())
    return np.array(starts, np.int64)


def text_sha256(text: str) -> str:
    """Return the name of a text's content."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Segment:
    """A segment opened for reading.

    Attributes:
        keys: float16 or bfloat16, shape (entries, width), mapped.
        values: Unsigned, shape (entries,), mapped.
        spans: Uint32, shape (entries, 2), mapped: character offsets in the document's text.
        entry_starts: Int64, shape (documents + 1,): first entry of every document.
    """

    def __init__(self, folder: Path, part: Part, *, key_dtype: str, key_width: int, value_dtype: str) -> None:
        self.folder = folder / part.name
        self.entries: int = part.details["entries"]
        self.documents: int = part.details["documents"]
        arrays = open_tensors(self.folder / "entries.safetensors") | open_tensors(self.folder / "keys.safetensors")
        kind = "float16" if key_dtype == "float16" else "int16"  # NumPy lacks bfloat16
        expected = {
            "values": (value_dtype, (self.entries,)),
            "spans": ("uint32", (self.entries, 2)),
            "entry_starts": ("int64", (self.documents + 1,)),
            "text_starts": ("int64", (self.documents + 1,)),
            "keys": (kind, (self.entries, key_width)),
        }
        if {name: (array.dtype.name, array.shape) for name, array in arrays.items()} != expected:
            raise DatastoreCorrupt(f"{self.folder} holds other tensors than its manifest says; build again")
        ends = {"entry_starts": self.entries, "text_starts": (self.folder / "documents.jsonl").stat().st_size}
        for name, end in ends.items():
            starts = arrays[name]
            if starts[0] != 0 or starts[-1] != end or (np.diff(starts) < 0).any():
                raise DatastoreCorrupt(f"{self.folder} has {name} that do not rise from 0 to {end}; build again")
        keys = arrays["keys"]
        self.keys: Tensor = torch.from_numpy(keys.view(np.int16)).view(KEY_TYPES[key_dtype][1])
        self.values: np.ndarray = arrays["values"]
        self.spans: np.ndarray = arrays["spans"]
        self.entry_starts: np.ndarray = np.asarray(arrays["entry_starts"])
        self._text_starts: np.ndarray = np.asarray(arrays["text_starts"])

    def document(self, number: int) -> dict[str, Any]:
        """Return a document's id, sha256, metadata and text."""
        start, stop = self._text_starts[number], self._text_starts[number + 1]
        with (self.folder / "documents.jsonl").open("rb") as file:
            file.seek(start)
            return self._parsed(file.read(stop - start))

    @cached_property
    def content(self) -> dict[str, int]:
        """Content hash of every document → its number."""
        with (self.folder / "documents.jsonl").open("rb") as file:
            return {self._parsed(line)["sha256"]: number for number, line in enumerate(file)}

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            document = json.loads(line)
            if all(isinstance(document[name], str) for name in ("id", "sha256", "text")) and "metadata" in document:
                return document
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise DatastoreCorrupt(f"{self.folder / 'documents.jsonl'} holds a line that is no document; build again")
