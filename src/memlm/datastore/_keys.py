"""The keys of one version, as an index needs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ._codec import Codec
from ._segment import Segment


@dataclass(frozen=True, eq=False)
class StoredKeys:
    """Keys of the segments of a version, one after the other.

    An index refers to this and not to the version, which refers to the index: in a cycle, the files of a datastore that
    nobody uses any more would stay open until the garbage collector comes by.

    Attributes:
        segments: Where they lie.
        live: Whether an entry is not deleted, shape (slots,); None where none is deleted.
        width: Numbers in a stored key.
        key_dtype: Type in which they are stored.
        metric: What distances are: "squared_l2", or "inner_product" for negative inner products.
        codec: What compressed keys are decoded with; None where they are as the encoder gave them.
    """

    segments: Sequence[Segment]
    live: npt.NDArray[np.bool_] | None
    width: int
    key_dtype: str
    metric: str
    codec: Codec | None

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """First entry of each segment, and the number of all."""
        return np.cumsum([0] + [segment.entries for segment in self.segments])

    @property
    def slots(self) -> int:
        """Entry numbers in use, those of deleted entries among them: every number is below it."""
        return int(self.starts[-1])

    @property
    def grid(self) -> tuple[Tensor, Tensor] | None:
        """Least place of each number's grid, and the step between its 256 places, float32, shape (width,) each; None
        where keys are not stored in "int8".
        """
        if self.codec is None or self.key_dtype != "int8":
            return None
        return self.codec.offset - 128 * self.codec.step, self.codec.step

    def key_blocks(self, rows: int = 1 << 16, start: int = 0) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield (first entry, keys as float32 of shape (at most `rows`, width)) from an entry on, also deleted ones."""
        for begin, segment in zip(self.starts, self.segments, strict=False):
            for first in range(max(0, start - int(begin)), segment.entries, rows):
                yield int(begin) + first, self._decoded(segment.keys[first : first + rows]).numpy()

    def gather_keys(self, entries: npt.NDArray[np.int64]) -> Tensor:
        """Return the stored keys of some entries, float32, shape (n, width)."""
        if len(self.segments) == 1:
            return self._decoded(self.segments[0].keys[torch.from_numpy(entries)])
        result = torch.empty((len(entries), self.width))
        owners = np.searchsorted(self.starts, entries, side="right") - 1
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            rows = torch.from_numpy(entries[mine] - self.starts[number])
            result[torch.from_numpy(mine)] = self._decoded(self.segments[number].keys[rows])
        return result

    def _decoded(self, stored: Tensor) -> Tensor:
        return stored.float() if self.codec is None else self.codec.decode(stored)
