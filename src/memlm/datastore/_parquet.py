"""Exports: the documents of a datastore as one Parquet file, and what they are bound to in its metadata.

One row a document: `id`, `text`, `metadata` (JSON), `values` (token ids of its entries) and `spans` (where these tokens
stand in the text), in an export of a pruned datastore `positions` and `counts` (which entries are left, and how many
each stands for), and in an export with keys `keys`. Parquet has no bfloat16: such keys are written as their bits.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import ConfigError
from ._manifest import FIRST_KEPT, Manifest, content_sha256, now
from ._part import check_fields
from ._segment import value_type

FORMAT = "memlm-export"
FORMAT_VERSION = 1
NAME = b"memlm"  # of the settings in the file's metadata
_SHAPE: dict[str, Any] = {
    "format_version": int,
    "encoder": {},
    "tokenizer": {"vocab_size": int},
    "windows": {},
    "metric": str,
    "keys": {},
    "corpus": {"source": str, "skipped": int},
    "documents": int,
    "entries": int,
    "segments": [int],
}


def arrow() -> tuple[Any, Any]:
    """Import pyarrow.

    Returns:
        `pyarrow` and `pyarrow.parquet`.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet files need pyarrow, which is not installed; pip install pyarrow, or memlm[parquet]"
        ) from error
    return pyarrow, pyarrow.parquet


def schema(keys: dict[str, Any] | None, *, pruned: bool) -> Any:
    """Return the columns of an export.

    Args:
        keys: "dtype" and "width" of the keys; None in an export without.
        pruned: Whether some of its documents are.
    """
    pa, _ = arrow()

    def rows(kind: Any, width: int | None = None) -> Any:
        inner = kind if width is None else pa.list_(pa.field("element", kind, nullable=False), width)
        return pa.list_(pa.field("element", inner, nullable=False))

    columns = {
        "id": pa.string(),
        "text": pa.string(),
        "metadata": pa.string(),
        "values": rows(pa.uint32()),
        "spans": rows(pa.uint32(), 2),
    }
    if pruned:
        columns |= {"positions": rows(pa.uint32()), "counts": rows(pa.uint32())}
    if keys is not None:
        columns["keys"] = rows(pa.float16() if keys["dtype"] == "float16" else pa.uint16(), keys["width"])
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def settings_of(manifest: Manifest, segments: list[int]) -> str:
    """Return what is written beside the rows, as JSON with a checksum.

    Args:
        manifest: Of the version.
        segments: Row groups of every segment.
    """
    settings = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "encoder": manifest.encoder,
        "tokenizer": manifest.tokenizer,
        "windows": manifest.windows,
        "metric": manifest.metric,
        "keys": manifest.encoder_keys,
        "corpus": {"source": manifest.corpus["source"], "skipped": manifest.corpus["skipped"]},
        "documents": manifest.documents,
        "entries": manifest.entries,
        "segments": segments,
    }
    return json.dumps({**settings, "sha256": content_sha256(settings)})


def checked_settings(text: bytes) -> tuple[dict[str, Any], Manifest]:
    """Read what a stranger's file says of itself, every field as strictly as that of a manifest.

    Returns:
        The settings, and a manifest with them that has no segment yet.

    Raises:
        ValueError, TypeError, KeyError: They are not as memlm writes them.
    """
    from .. import __version__

    settings = json.loads(text)
    if settings["format"] != FORMAT:
        raise ValueError(f"its format is {settings['format']!r}")
    if settings["format_version"] != FORMAT_VERSION:  # checked first: nothing else is known of another one
        raise ValueError(f"its format version is {settings['format_version']!r}; this memlm reads {FORMAT_VERSION}")
    check_fields(settings, _SHAPE, "the metadata")
    if settings.pop("sha256") != content_sha256(settings):
        raise ValueError("its metadata does not match its checksum")
    content = {name: settings[name] for name in ("encoder", "tokenizer", "windows", "metric", "keys")}
    content |= {
        "version": 1,
        "created": now(),
        "created_by": f"memlm {__version__}",
        "written": now(),
        "change": "import",
        "parent": None,
        "kept": FIRST_KEPT,
        "values": {"dtype": {"U16": "uint16", "U32": "uint32"}[value_type(settings["tokenizer"]["vocab_size"])]},
        "corpus": {**settings["corpus"], "complete": True},
        "segments": [],
        "index": None,
        "codec": None,
    }
    return settings, Manifest.of(content, 1)
