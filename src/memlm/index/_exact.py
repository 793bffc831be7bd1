"""Exact search: float32 distances to every stored key."""

from __future__ import annotations

from functools import cached_property
from typing import Any

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
    """

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self.details: dict[str, Any] = {"kind": "exact"}

    @cached_property
    def _resident(self) -> list[tuple[int, npt.NDArray[np.float32]]] | None:
        if len(self._keys) * self._keys.width * 4 > _RESIDENT:
            return None
        whole = np.empty((len(self._keys), self._keys.width), np.float32)
        for first, block in self._keys.key_blocks():
            whole[first : first + len(block)] = block
        return [(0, whole)]

    def search(self, queries: npt.NDArray[np.float32], k: int, exclude: tuple[int, int]) -> Neighbors:
        """See `Index.search`."""
        best, metric = Neighbors.empty(len(queries), k), FAISS_METRICS[self._keys.metric]
        for first, block in self._resident or self._keys.key_blocks(1 << 17):
            for start, stop in _allowed(first, first + len(block), exclude):
                part = block[start - first : stop - first]
                scores, rows = faiss.knn(queries, part, min(k, len(part)), metric=metric)
                entries = np.where(rows >= 0, rows + start, -1)
                best = _merge(best, Neighbors.from_search(entries, as_distances(scores, metric)), k)
        return best


def _allowed(start: int, stop: int, exclude: tuple[int, int]) -> list[tuple[int, int]]:
    """Return what remains of [start, stop) without the range excluded."""
    if exclude[0] >= exclude[1]:
        return [(start, stop)]
    pieces = [(start, min(stop, exclude[0])), (max(start, exclude[1]), stop)]
    return [piece for piece in pieces if piece[0] < piece[1]]


def _merge(left: Neighbors, right: Neighbors, k: int) -> Neighbors:
    """Return the k nearest of two results for the same queries; absent neighbors are infinitely far."""
    if left.present.any():
        both = left.beside(right)
        right = both.taken(np.argsort(both.distances, axis=1, kind="stable")[:, :k])
    missing = k - right.entries.shape[1]
    return right.beside(Neighbors.empty(len(right.entries), missing)) if missing else right
