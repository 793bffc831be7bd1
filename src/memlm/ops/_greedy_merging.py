"""Greedy merging of a datastore's entries (He, Neubig, Berg-Kirkpatrick 2021, arXiv:2109.04212, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def greedy_merging(order: Tensor, entries: Tensor, neighbors: Tensor) -> Tensor:
    """Return into which entry each one is merged.

    Entries are visited in an order. One that has not been merged takes in all its neighbors that have not been merged
    either and have taken in none. So what is merged is always near to what it is merged into.

    Args:
        order: In which entries are visited, a permutation of 0 to n − 1, int64, shape (n,).
        entries: First of each pair of near entries with the same value, rising, int64, shape (pairs,).
        neighbors: Second of each pair, int64, shape (pairs,).

    Returns:
        Int64, shape (n,): itself where an entry stays, another that stays where it goes. What an entry then counts is
        the sum over those that are merged into it.

    Example:
        Entries 0 and 1 are near to one another, and 1 and 2 are; 2 comes last, when 1 has taken in 0.

        >>> entries, neighbors = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 0, 2, 1])
        >>> greedy_merging(torch.tensor([0, 1, 2]), entries, neighbors)
        tensor([0, 0, 2])
    """
    n = len(order)
    starts = torch.searchsorted(entries.contiguous(), torch.arange(n + 1)).tolist()
    near = neighbors.tolist()  # one after the other, and each depends on those before: faster in lists than in tensors
    owners = list(range(n))
    took_in = [False] * n
    for entry in order.tolist():
        if owners[entry] != entry:
            continue
        for other in near[starts[entry] : starts[entry + 1]]:
            if other != entry and owners[other] == other and not took_in[other]:
                owners[other], took_in[entry] = entry, True
    return torch.tensor(owners, dtype=torch.long)
