"""Search: the nearest stored keys of a query."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DatastoreCorrupt, IndexError_
from ._exact import ExactIndex as ExactIndex
from ._faiss import HOW as HOW
from ._faiss import FaissIndex as FaissIndex
from ._faiss import build_faiss, empty_index
from ._protocol import Index as Index
from ._protocol import Keys as Keys
from ._tailed import TailedIndex as TailedIndex

if TYPE_CHECKING:
    from ..datastore._part import Part

__all__ = [
    "ExactIndex",
    "FaissIndex",
    "Index",
    "Keys",
    "TailedIndex",
    "auto_factory",
    "build_index",
    "check_factory",
    "open_index",
]

_EXACT_ENTRIES = 1 << 12  # up to which lists would be shorter than the 32 entries that their training needs
_EXACT_LIMIT = 1 << 25  # numbers in all keys up to which a scan of everything is quick enough
_MEMORY_LIMIT = 16 << 30  # bytes of 16-bit keys up to which the index holds them as they are


def auto_factory(entries: int, width: int, key_dtype: str) -> str:
    """Choose an index by the size of the datastore.

    Returns:
        "exact" for a small one; then inverted lists that hold the keys in their own 16-bit type, so that distances are
        those of the stored keys; then, beyond what memory holds, 8-bit lists whose proposals are ranked again. Keys
        that are stored in 8 bits get 8-bit lists at once, on their own grid, so that distances are those of the stored
        keys.

    Example:
        >>> auto_factory(10_000, 256, "float16"), auto_factory(1_000_000, 256, "float16")
        ('exact', 'IVF1024,SQfp16')
    """
    if entries <= _EXACT_ENTRIES or entries * width <= _EXACT_LIMIT:
        return "exact"
    lists = 1 << (math.isqrt(4 * entries).bit_length() - 1)  # the power of two just below 2 √entries
    if key_dtype == "int8" or entries * width * 2 > _MEMORY_LIMIT:
        return f"IVF{lists},SQ8"
    return f"IVF{lists},{'SQbf16' if key_dtype == 'bfloat16' else 'SQfp16'}"


def check_factory(factory: str, width: int, metric: str) -> None:
    """Raise IndexError_ unless `build_index` knows this factory for keys of this width and metric."""
    if factory not in ("auto", "exact"):
        empty_index(factory, width, metric)


def build_index(keys: Keys, folder: Path, factory: str, *, name: str, show_progress: bool = False) -> Part | None:
    """Build a search index into `folder/name`; None where the factory is (or `auto` picks) "exact".

    Args:
        keys: The datastore.
        folder: Where indexes lie.
        factory: "auto", "exact", or a FAISS factory string such as "IVF1024,SQ8".
        name: Of the new index.
        show_progress: Show rate and time left on stderr.

    Raises:
        IndexError_: FAISS refuses the factory string or the keys.
    """
    if factory == "auto":
        factory = auto_factory(keys.slots, keys.width, keys.key_dtype)
    return None if factory == "exact" else build_faiss(keys, folder, factory, name, show_progress=show_progress)


def open_index(keys: Keys, folder: Path, part: Part | None, known: Index | None = None, *, verify: bool) -> Index:
    """Open the index that a manifest names; exact search where it names none, and of newer entries than it holds.

    Args:
        keys: The version of the datastore.
        folder: Where indexes lie.
        part: The index.
        known: What was open before; an index that is the same part is not read again.
        verify: Compare its file with its checksum.
    """
    if part is None:
        return ExactIndex(keys)
    if part.details["kind"] != "faiss":
        raise IndexError_(f"the index of kind {part.details['kind']!r} is not known here; rebuild it {HOW}")
    known = known.older if isinstance(known, TailedIndex) else known
    if not isinstance(known, FaissIndex) or known.part != part:
        try:
            part.check(folder, contents=verify)
        except DatastoreCorrupt as error:
            raise DatastoreCorrupt(f"{error}, or rebuild it {HOW}") from error
    index = FaissIndex(keys, folder, part, known)
    return index if part.details["entries"] == keys.slots else TailedIndex(index, ExactIndex(keys, index.entries))
