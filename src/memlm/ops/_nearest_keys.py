"""Exact search in a memory of keys that lie on the device, by inner product."""

from __future__ import annotations

import torch
from torch import Tensor

_TOGETHER = 1 << 24  # scores held at once: 64 MiB


def largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of the last dimension, in descending order, as `torch.topk` does but quicker in long rows.

    The k largest numbers lie in the k blocks with the largest maxima. So the maxima of blocks are sorted, and then the
    numbers in k blocks, in the place of all numbers; with m of them √(m/k) to a block is best.

    Args:
        scores: Shape (…, m).
        k: How many, at most m.

    Returns:
        Values and int64 places, both of shape (…, k). Which of several equal numbers are taken is not said.

    Example:
        >>> largest(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), 2)
        (tensor([[4., 3.]]), tensor([[1, 3]]))
    """
    m = scores.shape[-1]
    block = 1 << (int((m / k) ** 0.5).bit_length() - 1)
    if block < 8:
        values, order = scores.topk(k, dim=-1)
        return values, order
    whole = m // block * block
    blocks = scores[..., :whole].unflatten(-1, (-1, block))  # (…, blocks, block)
    best = blocks.amax(dim=-1).topk(k, dim=-1, sorted=False).indices  # (…, k)
    places = (best[..., None] * block + torch.arange(block, device=scores.device)).flatten(-2)  # (…, k · block)
    if whole < m:
        rest = torch.arange(whole, m, device=scores.device).expand(*scores.shape[:-1], -1)
        places = torch.cat([places, rest], dim=-1)
    values, order = scores.gather(-1, places).topk(k, dim=-1)
    return values, places.gather(-1, order)


@torch.no_grad()
def nearest_keys(queries: Tensor, keys: Tensor, places: Tensor, before: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the keys of a memory with the largest inner products, exactly; products are never in half precision.

    A query sees the entry at slot j if 0 ≤ place_j < before. No gradient flows through the choice.

    Args:
        queries: Shape (rows, heads, n, d).
        keys: Shape (rows, heads, m, d).
        places: When each slot was written, int64, shape (rows, m); negative where it is empty.
        before: Shape (rows, n), int64.
        k: Neighbors.

    Returns:
        Slots, int64, and whether there is an entry that the query sees, bool; both of shape (rows, heads, n, k') with
        k' the smaller of k and m.

    Example:
        >>> keys = torch.tensor([1.0, 3.0, 2.0]).view(1, 1, 3, 1)
        >>> slots, found = nearest_keys(
        ...     torch.ones(1, 1, 1, 1), keys, torch.tensor([[0, 1, 2]]), torch.tensor([[1]]), 2
        ... )
        >>> slots[found]
        tensor([0])
    """
    with torch.autocast(queries.device.type, enabled=False):
        wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
        columns = keys.to(wide).transpose(-1, -2)  # (rows, heads, d, m)
        rows, heads, n, _ = queries.shape
        m = keys.shape[2]
        all_seen = bool(((places >= 0) & (places < before.amin(dim=1, keepdim=True))).all())
        found = []
        for some in torch.arange(n, device=queries.device).split(max(1, _TOGETHER // max(1, rows * heads * m))):
            scores = queries[:, :, some].to(wide) @ columns  # (rows, heads, some, m)
            if not all_seen:
                seen = (places >= 0)[:, None] & (places[:, None] < before[:, some, None])  # (rows, some, m)
                scores.masked_fill_(~seen[:, None], -torch.inf)
            found.append(largest(scores, min(k, m)))
    values, slots = (torch.cat(parts, dim=2) for parts in zip(*found, strict=True))
    return slots, values > -torch.inf
