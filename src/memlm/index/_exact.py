"""Exact search: float32 distances to every stored key."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch  # noqa: F401  (before faiss: both bring an OpenMP runtime)

import faiss  # isort: skip

from ..neighbors import Neighbors
from ._metric import FAISS_METRICS, as_distances
from ._protocol import Keys

_RESIDENT = 2 << 30  # bytes of float32 keys that are kept in memory between searches


class ExactIndex:
    """Scans all keys, in float32, whatever type they are stored in.

    Keys that fit are converted once and kept; larger datastores are converted block by block at every search.

    Args:
        keys: The version of a datastore.
        start: Entry from which on it searches.
    """

    def __init__(self, keys: Keys, start: int = 0) -> None:
        self._keys = keys
        self._start = start
        self.details: dict[str, Any] = {"kind": "exact"}

    @cached_property
    def _resident(self) -> list[Block] | None:
        if (self._keys.slots - self._start) * self._keys.width * 4 > _RESIDENT:
            return None
        blocks = list(self._blocks())
        if len(blocks) < 2:
            return blocks
        entries, keys = zip(*blocks, strict=True)
        return [Block(np.concatenate(entries), np.concatenate(keys))]

    def _blocks(self) -> Iterator[Block]:
        """Yield what is not deleted, rising."""
        live = self._keys.live
        for first, keys in self._keys.key_blocks(1 << 17, self._start):
            entries = np.arange(first, first + len(keys))
            if live is None:
                yield Block(entries, keys)
            elif (wanted := live[entries]).any():
                yield Block(entries[wanted], keys[wanted])

    def search(self, queries: npt.NDArray[np.float32], k: int, exclude: tuple[int, int]) -> Neighbors:
        """See `Index.search`."""
        best, metric = Neighbors.empty(len(queries), k), FAISS_METRICS[self._keys.metric]
        for block in self._resident if self._resident is not None else self._blocks():
            for entries, keys in block.without(exclude):
                scores, rows = faiss.knn(queries, keys, min(k, len(keys)), metric=metric)
                found = np.where(rows >= 0, entries[rows], -1)
                best = merged(best, Neighbors.from_search(found, as_distances(scores, metric)), k)
        return best


class Block(NamedTuple):
    """Some keys in float32, shape (n, width), and the entries that they belong to, rising, shape (n,)."""

    entries: npt.NDArray[np.int64]
    keys: npt.NDArray[np.float32]

    def without(self, exclude: tuple[int, int]) -> list[Block]:
        """Return what remains without a range of entries [from, to)."""
        first, stop = np.searchsorted(self.entries, exclude) if exclude[0] < exclude[1] else (len(self.entries),) * 2
        parts = (slice(first), slice(stop, None))
        pieces = [Block(self.entries[part], self.keys[part]) for part in parts]
        return [piece for piece in pieces if len(piece.entries)]


def merged(left: Neighbors, right: Neighbors, k: int) -> Neighbors:
    """Return the k nearest of two results for the same queries; absent neighbors are infinitely far."""
    if left.present.any():
        both = left.beside(right)
        right = both.taken(np.argsort(both.distances, axis=1, kind="stable")[:, :k])
    missing = k - right.entries.shape[1]
    return right.beside(Neighbors.empty(len(right.entries), missing)) if missing else right
