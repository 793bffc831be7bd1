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

from ..errors import ConfigError, DatastoreCorrupt, KeyOverflow
from ._manifest import Part
from ._tensors import create_tensors, open_tensors

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
        if key_dtype not in KEY_TYPES:
            raise ConfigError(f"key type is {key_dtype!r}; expected one of {', '.join(KEY_TYPES)}")
        folder.mkdir(parents=True)
        self.key_dtype = key_dtype
        self.documents = len(documents)
        counts = [max(0, len(item.ids) - 1) for item in documents]
        self.entries = sum(counts)
        text_starts = _write_documents(folder / "documents.jsonl", documents)
        values = value_type(vocab_size)
        layout = {
            "values": (values, (self.entries,)),
            "spans": ("U32", (self.entries, 2)),
            "entry_starts": ("I64", (self.documents + 1,)),
            "text_starts": ("I64", (self.documents + 1,)),
        }
        maps = create_tensors(folder / "entries.safetensors", layout)
        maps["entry_starts"][:] = np.concatenate([[0], np.cumsum(counts)])
        maps["text_starts"][:] = text_starts
        for item, start, count in zip(documents, maps["entry_starts"], counts, strict=False):
            if count and (item.ids.min() < 0 or item.ids.max() >= vocab_size):
                raise KeyOverflow(f"{item.document.id!r} has token ids outside the vocabulary of {vocab_size}")
            maps["values"][start : start + count] = item.ids[1:]
            maps["spans"][start : start + count] = item.spans[1:]
        for array in maps.values():
            if isinstance(array, np.memmap):
                array.flush()
        kind, self._dtype = KEY_TYPES[key_dtype]
        self._keys = create_tensors(folder / "keys.safetensors", {"keys": (kind, (self.entries, key_width))})["keys"]

    def write_keys(self, rows: Tensor, keys: Tensor) -> None:
        """Store keys at their rows; rows int64 (n,), keys any float type (n, width).

        Raises:
            KeyOverflow: A key is not finite, as computed or in the type of storage.
        """
        stored = keys.to("cpu", self._dtype)
        if not stored.isfinite().all():
            if not keys.isfinite().all():
                raise KeyOverflow("the model gave keys that are NaN or infinite; check its weights and its dtype")
            raise KeyOverflow(f"keys up to {keys.abs().max():.3g} overflow float16; use key type bfloat16")
        self._keys[rows.numpy()] = stored.view(torch.int16).numpy().view(self._keys.dtype)

    def finish(self) -> dict[str, int]:
        """Make everything durable and return the segment's details for the manifest."""
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
            file.write(json.dumps({**row, "text": text}, ensure_ascii=True).encode() + b"\n")
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

    def __init__(self, folder: Path, part: Part, *, key_dtype: str, key_width: int) -> None:
        self.folder = folder / part.name
        self.entries: int = part.details["entries"]
        self.documents: int = part.details["documents"]
        arrays = open_tensors(self.folder / "entries.safetensors")
        keys = open_tensors(self.folder / "keys.safetensors").get("keys")
        expected = {
            "values": (self.entries,),
            "spans": (self.entries, 2),
            "entry_starts": (self.documents + 1,),
            "text_starts": (self.documents + 1,),
        }
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != expected or keys is None or keys.shape != (self.entries, key_width):
            raise DatastoreCorrupt(f"{self.folder} holds tensors of other shapes than its manifest says")
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
            return json.loads(file.read(stop - start))

    @cached_property
    def content(self) -> dict[str, int]:
        """Content hash of every document → its number."""
        with (self.folder / "documents.jsonl").open("rb") as file:
            return {json.loads(line)["sha256"]: number for number, line in enumerate(file)}
