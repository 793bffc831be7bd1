"""An index over older entries beside exact search of those that were added since."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..neighbors import Neighbors
from ._exact import ExactIndex, merged
from ._faiss import FaissIndex


class TailedIndex:
    """Searches both and returns the nearest of what they find; distances of both are those to the stored keys."""

    def __init__(self, older: FaissIndex, newer: ExactIndex) -> None:
        self.older, self.newer = older, newer

    @property
    def details(self) -> dict[str, Any]:
        """See `Index.details`."""
        return self.older.details

    def search(self, queries: npt.NDArray[np.float32], k: int, exclude: tuple[int, int]) -> Neighbors:
        """See `Index.search`."""
        found = self.older.search(queries, k, exclude)
        return merged(found, self.newer.search(queries, k, exclude), k)
