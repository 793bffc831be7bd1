"""What a reader needs of a table of rows, and the table that is two tensors."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Nearest(NamedTuple):
    """Rows found for some queries, best first.

    Attributes:
        keys: Shape (n, k, key width).
        values: Shape (n, k, value width).
        present: Bool, shape (n, k); what is absent has arbitrary keys and values.
    """

    keys: Tensor
    values: Tensor
    present: Tensor


class Rows(Protocol):
    """What can be read: a `Bank`, or `TensorRows`."""

    def nearest(self, queries: Tensor, k: int) -> Nearest:
        """Return the k rows of the largest inner products with each query, shape (n, key width)."""
        ...


class TensorRows:
    """Rows in memory, on any device; gradients flow to those that are found.

    Args:
        keys: Shape (rows, key width).
        values: Shape (rows, value width).
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values

    def __len__(self) -> int:
        return len(self.keys)

    def nearest(self, queries: Tensor, k: int) -> Nearest:
        """Return the k rows of the largest inner products with each query, shape (n, key width)."""
        found = min(k, len(self.keys))
        with torch.no_grad():
            ids = (queries.to(self.keys) @ self.keys.T).topk(found, dim=1).indices  # (n, found)
        present = torch.ones_like(ids, dtype=torch.bool)
        if found < k:
            missing = (0, k - found)
            ids, present = (torch.nn.functional.pad(item, missing) for item in (ids, present))
        if not found:
            empty = (len(queries), k)
            return Nearest(
                self.keys.new_zeros(*empty, self.keys.shape[1]),
                self.values.new_zeros(*empty, self.values.shape[1]),
                present,
            )
        return Nearest(self.keys[ids], self.values[ids], present)
