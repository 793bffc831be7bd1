"""Making a datastore of an export: with its keys, without a model; or of its documents, as any corpus."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..documents import Document, describe
from ..errors import DatastoreCorrupt, MemlmError
from ..files import new_folder
from ..progress import progress
from ..text import count
from ._manifest import Manifest
from ._parquet import NAME, arrow, checked_settings, schema
from ._part import Part
from ._pruned import Pruned
from ._segment import Stored
from ._writing import segment_used, write_segment

_TEXTS = ["id", "text", "metadata"]
_ENTRIES = [*_TEXTS, "values", "spans"]
_PRUNED = ["positions", "counts"]


class Export:
    """A file that `Datastore.to_parquet` wrote, opened and checked; iterating yields its documents.

    Args:
        file: Path of the file.

    Attributes:
        manifest: Of a datastore that is as the export says, and has no segment yet.
        has_keys: It can be imported without a model.
        documents: Number of documents.
        entries: Number of their entries.

    Raises:
        ConfigError: pyarrow is not installed.
        DatastoreCorrupt: It is no such file, or damaged.
        OSError: It cannot be read.
    """

    def __init__(self, file: str | Path) -> None:
        _, parquet = arrow()
        self.path = Path(file)
        with self.path.open("rb"):  # says in one line that it is not there, or may not be read
            pass
        with self._reading():
            self._file = parquet.ParquetFile(self.path, page_checksum_verification=True)
            written = self._file.metadata.metadata or {}
            if NAME not in written:
                raise ValueError("it lacks the metadata of `memlm export`")
            settings, self.manifest = checked_settings(written[NAME])
            self.documents: int = settings["documents"]
            self.entries: int = settings["entries"]
            self.has_keys = "keys" in self._file.schema_arrow.names
            self._pruned = "counts" in self._file.schema_arrow.names
            expected = schema(self.manifest.keys if self.has_keys else None, pruned=self._pruned)
            for name in {*expected.names, *self._file.schema_arrow.names}:
                if name not in self._file.schema_arrow.names or name not in expected.names:
                    raise ValueError(f"it has the columns {self._file.schema_arrow.names}")
                found, wanted = (item.field(name).type for item in (self._file.schema_arrow, expected))
                if found != wanted:
                    raise ValueError(f"its column {name!r} has the type {found}; expected {wanted}")
            groups = settings["segments"]
            if sum(groups) != self._file.num_row_groups or 0 in groups:
                raise ValueError(f"it has {self._file.num_row_groups} row groups; expected {sum(groups)}")
            if self._file.metadata.num_rows != self.documents:
                raise ValueError(f"it has {self._file.metadata.num_rows} rows; expected {self.documents}")
            stops = np.cumsum([0, *groups]).tolist()
        self.segments = [range(first, stop) for first, stop in pairwise(stops)]

    def __fspath__(self) -> str:
        return str(self.path)

    def __iter__(self) -> Iterator[Document]:
        for group in range(self._file.num_row_groups):
            with self._reading():
                columns = self._read(group, _TEXTS)
                rows = zip(*(columns[name].to_pylist() for name in _TEXTS), strict=True)
                documents = [_document(*row) for row in rows]
            yield from documents

    def stored(self, group: int) -> list[Stored]:
        """Return the documents of a row group as a segment holds them."""
        with self._reading():
            columns = self._read(group, [*_ENTRIES, *(_PRUNED if self._pruned else [])])
            lengths = np.diff(columns["values"].offsets.to_numpy())
            for name in columns.keys() - {*_TEXTS}:
                if not np.array_equal(lengths, np.diff(columns[name].offsets.to_numpy())):
                    raise ValueError(f"it has documents with other numbers of values and of {name}")
            values = columns["values"].flatten().to_numpy()
            spans = columns["spans"].flatten().flatten().to_numpy().reshape(-1, 2)
            left = [columns[name].flatten().to_numpy() for name in _PRUNED] if self._pruned else None
            size = self.manifest.tokenizer["vocab_size"]
            if values.max(initial=0) >= max(1, size):
                raise ValueError(f"it has the token id {values.max()}; expected ids below {size}")
            rows, stop = [], 0
            for length, *row in zip(lengths, *(columns[name].to_pylist() for name in _TEXTS), strict=True):
                start, stop = stop, stop + int(length)
                document = _document(*row)
                mine = spans[start:stop]
                if mine.max(initial=0) > len(document.text) or (mine[:, 0] > mine[:, 1]).any():
                    raise ValueError(f"entries of {document.id!r} lie outside its text")
                pruned = None if left is None else Pruned(*(part[start:stop] for part in left))
                if pruned is not None and not pruned.sound:
                    raise ValueError(f"entries of {document.id!r} have positions or counts that cannot be")
                rows.append(Stored.with_entries(document, values[start:stop], mine, pruned))
            return rows

    def keys(self, group: int, entries: int) -> Tensor:
        """Return the keys of a row group with so many entries, float16 or bfloat16, shape (entries, width)."""
        with self._reading():
            flat = self._read(group, ["keys"])["keys"].flatten().flatten().to_numpy(zero_copy_only=False)
            keys = torch.from_numpy(np.array(flat).view(np.int16).reshape(-1, self.manifest.keys["width"]))
            keys = keys.view(getattr(torch, self.manifest.keys["dtype"]))
            if len(keys) != entries:
                raise ValueError(f"a row group of {entries} entries has {len(keys)} keys")
            if not keys.isfinite().all():
                entry, number = (~keys.isfinite()).nonzero()[0].tolist()
                value = float(keys[entry, number])
                raise ValueError(
                    f"number {number} of key {entry} in row group {group} is {value}; expected finite ones"
                )
            return keys

    def _read(self, group: int, columns: list[str]) -> dict[str, Any]:
        """Read columns of a row group, everything about them checked that Arrow can check."""
        table = self._file.read_row_group(group, columns=columns)
        table.validate(full=True)
        result = {}
        for name in columns:
            column = table[name].combine_chunks()
            inner = column
            while inner.null_count == 0 and hasattr(inner, "flatten") and hasattr(inner.type, "value_type"):
                inner = inner.flatten()
            if inner.null_count:
                raise ValueError(f"its column {name!r} holds nulls")
            result[name] = column
        return result

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what damage raises into one line."""
        pa, _ = arrow()
        try:
            yield
        except MemlmError:
            raise
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise DatastoreCorrupt(
                f"{self.path} is not a sound export ({type(error).__name__}: {reason}); export it again"
            ) from error


def import_documents(
    export: Export, path: Path, index_of: Callable[[Path, Manifest], Part | None], *, show_progress: bool
) -> None:
    """Write a new datastore with the documents of an export and their keys; see `Datastore.from_parquet`.

    Args:
        export: With keys.
        path: Folder to make.
        index_of: Builds the index of a version that is not published yet, in a folder.
        show_progress: Show rate and time left on stderr.
    """
    manifest = replace(export.manifest, change=f"import of {describe(export.path.name)}")
    seen: set[bytes] = set()
    with new_folder(path) as folder, progress("importing", export.entries, show=show_progress) as advance:
        for groups in export.segments:
            stored = [export.stored(group) for group in groups]
            for item in (item for group in stored for item in group):
                if item.id_sha256 in seen:
                    name = json.loads(item.line)["id"]
                    raise DatastoreCorrupt(f"{export.path} holds two documents with the id {name!r}; export it again")
                seen.add(item.id_sha256)
            sizes = [sum(len(item.values) for item in group) for group in stored]

            def keys(groups: range = groups, sizes: list[int] = sizes) -> Iterator[tuple[Tensor, Tensor]]:
                start = 0
                for group, size in zip(groups, sizes, strict=True):
                    yield torch.arange(start, start + size), export.keys(group, size)
                    start += size
                    advance(size)

            part = write_segment(folder, manifest, [item for group in stored for item in group], keys())
            kept = {**manifest.kept, **segment_used(manifest)}
            manifest = replace(manifest, segments=(*manifest.segments, part), kept=kept)
        if manifest.entries != export.entries:
            entries = count(manifest.entries, "entry", "entries")
            raise DatastoreCorrupt(f"{export.path} has {entries}; expected {export.entries:,}; export it again")
        replace(manifest, index=index_of(folder, manifest)).publish(folder)


def _document(name: str, text: str, metadata: str) -> Document:
    if not name:
        raise ValueError("it has a document whose id is ''; expected one character at least")
    if not text.strip():
        raise ValueError(f"the text of {name!r} is {text[:40]!r}; expected something to read")
    content = json.loads(metadata)
    if not isinstance(content, dict):
        raise ValueError(f"the metadata of {name!r} is {metadata[:40]!r}; expected a JSON object")
    return Document(id=name, text=text, metadata=content)
