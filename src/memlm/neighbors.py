"""What a search returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Neighbors(NamedTuple):
    """The nearest entries of each query, nearest first.

    Attributes:
        entries: Entry numbers, int64, shape (n, k); 0 where absent.
        distances: To the stored keys: squared L2 or the negative inner product, as the datastore's metric says;
            float32, shape (n, k); +inf where absent.
        present: Bool, shape (n, k). False where fewer than k entries were found; such places are always last.
    """

    entries: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    present: npt.NDArray[np.bool_]

    @classmethod
    def empty(cls, n: int, k: int) -> Neighbors:
        """Return n rows in which nothing was found."""
        return cls(np.zeros((n, k), np.int64), np.full((n, k), np.inf, np.float32), np.zeros((n, k), bool))

    def taken(self, order: npt.NDArray[np.int64]) -> Neighbors:
        """Return the neighbors at some places of each row, shape (n, any number)."""
        return Neighbors(
            np.take_along_axis(self.entries, order, axis=1),
            np.take_along_axis(self.distances, order, axis=1),
            np.take_along_axis(self.present, order, axis=1),
        )

    def rows(self, rows: npt.NDArray[Any]) -> Neighbors:
        """Return the neighbors of some queries: numbers or a mask."""
        return Neighbors(self.entries[rows], self.distances[rows], self.present[rows])

    def put(self, rows: npt.NDArray[Any], other: Neighbors) -> None:
        """Write neighbors over the first ones of some queries."""
        for whole, part in zip(self, other, strict=True):
            whole[rows, : part.shape[1]] = part

    def beside(self, other: Neighbors) -> Neighbors:
        """Return the neighbors of both, for the same queries, these first."""
        return Neighbors(
            np.concatenate([self.entries, other.entries], axis=1),
            np.concatenate([self.distances, other.distances], axis=1),
            np.concatenate([self.present, other.present], axis=1),
        )

    @classmethod
    def from_search(cls, entries: np.ndarray, distances: np.ndarray) -> Neighbors:
        """Turn the result of a search that marks absent neighbors by −1 into one with a mask."""
        present = entries >= 0
        return cls(
            np.where(present, entries, 0).astype(np.int64),
            np.where(present, distances, np.inf).astype(np.float32),
            present,
        )
