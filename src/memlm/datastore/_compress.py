"""Compression: every key is stored as a code, in one commit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import ConfigError, DatastoreError
from ..text import count
from ._compact import rewrite
from ._fit_codec import fit_codec
from ._keys import StoredKeys
from ._manifest import Manifest
from ._part import Part
from ._stored import Directory
from ._writing import writing

_SAMPLE = 1 << 16  # keys that a codec is fitted to


def compress_segments(
    path: Path,
    index_of: Callable[[Manifest], Part | None],
    *,
    width: int,
    key_dtype: str,
    segment_entries: int,
    show_progress: bool,
) -> None:
    """Fit a codec to a sample of the keys that are not deleted, and rewrite all of them with it, as a compaction does.

    Args:
        path: The datastore's folder.
        index_of: Builds the index of a version that is not published yet.
        width: Numbers to keep of a key.
        key_dtype: "int8" or "float16".
        segment_entries: Entries a segment, about.
        show_progress: Show rate and time left on stderr.

    Raises:
        ConfigError: The width or the type cannot be, or there are no more entries than `width`.
        DatastoreError: The keys are compressed already, or there are none.
    """
    with writing(path, "compress") as manifest:
        if manifest.codec is not None:
            raise DatastoreError(
                f"the keys of {path} are compressed already, to {manifest.keys['width']} × {manifest.keys['dtype']}; "
                "build again to compress them in another way"
            )
        if not manifest.entries:
            raise DatastoreError(f"{path} has no entries to fit a codec to; add documents first")
        if manifest.entries <= width:  # n keys lie in a space of n - 1 numbers: the others would mean nothing
            entries = count(manifest.entries, "entry", "entries")
            raise ConfigError(
                f"width is {width}, but {path} has {entries}; expected more entries than numbers in a key: choose a "
                "smaller width, or add documents first"
            )
        old = Directory.open(path, manifest, verify=True)
        keys = StoredKeys(old.segments, None, manifest.keys["width"], manifest.keys["dtype"], manifest.metric, None)
        live = np.flatnonzero(old.live())
        chosen = np.random.default_rng(0).choice(live, min(len(live), _SAMPLE), replace=False)
        codec = fit_codec(keys.gather_keys(np.sort(chosen)), width, key_dtype, manifest.metric)
        draft = manifest.following(f"compress keys to {width} × {key_dtype}")
        draft = replace(
            draft,
            keys={"dtype": key_dtype, "width": width},
            codec=codec.write(path / "codec", f"{draft.version:06d}", manifest.keys),
            kept={**draft.kept, "first_codec": draft.version},
        )
        rewrite(path, old, draft, index_of, codec.encode, segment_entries=segment_entries, show_progress=show_progress)
