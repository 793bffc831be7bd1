"""Writing the documents of a version into one Parquet file; see `_parquet` for its columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, DatastoreError
from ..files import atomic_writer, refuse_existing
from ..progress import progress
from ._parquet import NAME, arrow, schema, settings_of
from ._segment import Segment
from ._version import Version

_GROUP_BYTES = 8 << 20  # of texts and keys in a row group, about; what writer and reader hold in memory


def export_documents(version: Version, file: Path, *, keys: bool, show_progress: bool) -> None:
    """Write all documents that are not removed; see `Datastore.to_parquet`."""
    pa, parquet = arrow()
    refuse_existing(file)
    manifest = version.manifest
    if keys and manifest.codec is not None:
        raise ConfigError(
            "the keys are compressed, and an export has them as the model gave them; export without keys, or share the "
            "folder (`memlm push`)"
        )
    columns = schema(manifest.keys if keys else None, pruned=version.counts is not None)
    settings = {
        "compression": {"id": "zstd", "text": "zstd", "metadata": "zstd", "values.list.element": "zstd"},
        "use_dictionary": False,
        "write_statistics": ["id"],
        "write_page_checksum": True,
    }
    segments = []
    with progress("exporting", manifest.entries, show=show_progress) as advance, atomic_writer(file) as opened:
        with parquet.ParquetWriter(opened, columns, **settings) as writer:
            for segment, places in version.live_documents():
                groups = 0
                for group in _row_groups(segment, places, _row_bytes(manifest.keys if keys else None)):
                    writer.write_table(_table(pa, columns, segment, group), row_group_size=len(group))
                    advance(sum(segment.rows(number).stop - segment.rows(number).start for number in group))
                    groups += 1
                segments += [groups] if groups else []
            writer.add_key_value_metadata({NAME: settings_of(manifest, segments)})
        refuse_existing(file)


def _row_bytes(keys: dict[str, Any] | None) -> int:
    """Return the bytes of an entry, about."""
    return 12 + (0 if keys is None else 2 * keys["width"])


def _row_groups(segment: Segment, places: Iterable[int], entry: int) -> Iterator[list[int]]:
    """Gather documents of a segment until a row group is full."""
    group: list[int] = []
    size = 0
    for number in places:
        rows = segment.rows(number)
        length = len(segment.line(number)) + (rows.stop - rows.start) * entry
        if group and size + length > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(number)
        size += length
    if group:
        yield group


def _table(pa: Any, columns: Any, segment: Segment, group: list[int]) -> Any:
    """Return documents of a segment as Arrow holds them."""
    documents = [segment.document(number) for number in group]
    rows = [segment.rows(number) for number in group]
    starts = pa.array(np.cumsum([0, *(item.stop - item.start for item in rows)]), pa.int32())

    def strings(name: str, texts: list[str]) -> Any:
        try:
            return pa.array(texts, pa.string())
        except UnicodeEncodeError as error:
            raise DatastoreError(f"Parquet does not take the {name} {error.object!r}: it is not valid UTF-8") from error

    def lists(name: str, arrays: list[np.ndarray]) -> Any:
        kind = columns.field(name).type
        flat = np.concatenate(arrays)
        inner = kind.value_type
        if pa.types.is_fixed_size_list(inner):
            numbers = pa.array(flat.reshape(-1), inner.value_type)
            values = pa.FixedSizeListArray.from_arrays(numbers, type=inner)
        else:
            values = pa.array(flat, inner)
        return pa.ListArray.from_arrays(starts, values, type=kind)

    arrays = {
        "id": strings("id", [item["id"] for item in documents]),
        "text": strings("text", [item["text"] for item in documents]),
        "metadata": strings("metadata", [json.dumps(item["metadata"]) for item in documents]),
        "values": lists("values", [segment.values[item].astype(np.uint32) for item in rows]),
        "spans": lists("spans", [segment.spans[item] for item in rows]),
    }
    if "counts" in columns.names:
        left = [segment.pruned(number) for number in group]
        arrays |= {name: lists(name, [getattr(item, name) for item in left]) for name in ("positions", "counts")}
    if "keys" in columns.names:
        bits = [segment.keys[item].view(torch.int16).numpy() for item in rows]
        kind = np.float16 if columns.field("keys").type.value_type.value_type == pa.float16() else np.uint16
        arrays["keys"] = lists("keys", [item.view(kind) for item in bits])
    return pa.table(arrays, schema=columns)
