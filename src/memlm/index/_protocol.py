"""What an index is, and what it needs of a datastore."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..neighbors import Neighbors


class Keys(Protocol):
    """Stored keys, as a datastore offers them."""

    @property
    def slots(self) -> int:
        """Entry numbers in use."""
        ...

    @property
    def live(self) -> npt.NDArray[np.bool_] | None:
        """Whether an entry is not deleted, shape (slots,); None where none is deleted."""
        ...

    @property
    def width(self) -> int:
        """Numbers in a stored key, and in a query."""
        ...

    @property
    def key_dtype(self) -> str:
        """Type in which keys are stored: "float16", "bfloat16", or "int8" for places of a grid."""
        ...

    @property
    def grid(self) -> tuple[Tensor, Tensor] | None:
        """Least place of each number's grid of 256, and the step between places, float32, shape (width,) each; None
        where keys are not stored in "int8".
        """
        ...

    @property
    def metric(self) -> str:
        """What distances are, one of `evidence.METRICS`."""
        ...

    def key_blocks(self, rows: int = ..., start: int = ...) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield (first entry, float32 keys) from an entry on, also what is deleted."""
        ...

    def gather_keys(self, entries: npt.NDArray[np.int64]) -> Tensor:
        """Return some keys, float32; what is returned may be overwritten."""
        ...


class Index(Protocol):
    """Nearest-neighbor search over stored keys, by their metric; distances are smaller where keys are nearer."""

    @property
    def details(self) -> dict[str, Any]:
        """Kind and settings, as plain values."""
        ...

    def search(self, queries: npt.NDArray[np.float32], k: int, exclude: tuple[int, int]) -> Neighbors:
        """Return the k nearest entries of every query (float32, (n, width)), none deleted or in [from, to)."""
        ...
