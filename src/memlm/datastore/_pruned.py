"""Which entries of a document are left, and how many each stands for; `_prune` chooses them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MOST_ENTRIES = (1 << 32) - 1  # of a document: positions and counts are uint32


class Pruned(NamedTuple):
    """What is left of a pruned document's entries; see `Datastore.prune`.

    Attributes:
        positions: Of the entries in the document's sequence, rising, uint32, shape (entries,).
        counts: How many entries each of them stands for, at least 1, uint32, shape (entries,).
    """

    positions: npt.NDArray[np.uint32]
    counts: npt.NDArray[np.uint32]

    @classmethod
    def none(cls, entries: int) -> Pruned:
        """Return what a document has that is not pruned."""
        return cls(np.arange(entries, dtype=np.uint32), np.ones(entries, np.uint32))

    @property
    def whole(self) -> bool:
        """Whether nothing was merged."""
        return bool((self.counts == 1).all() and (self.positions == np.arange(len(self.positions))).all())

    @property
    def sound(self) -> bool:
        """Whether the numbers are such as can be: entries add up to a document that has all these positions."""
        total = int(self.counts.sum(dtype=np.int64))
        fits = total <= MOST_ENTRIES and self.positions.max(initial=0) < max(1, total)
        return bool(fits and (np.diff(self.positions.astype(np.int64)) > 0).all() and (self.counts > 0).all())
