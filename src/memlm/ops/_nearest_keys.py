"""Exact search in a memory of keys that lie on the device, by inner product."""

from __future__ import annotations

import torch
from torch import Tensor

_ON_CPU, _ELSEWHERE = 1 << 22, 1 << 27  # scores held at once: 16 MiB stay near the processor
_QUERIES = 64  # with fewer at once, a matrix product is slow


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
@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
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
    (rows, heads, n, _), m = queries.shape, keys.shape[2]
    k = min(k, m)
    seen_by_all = bool(((places >= 0) & (places < before.amin(dim=1, keepdim=True))).all())
    room = _ON_CPU if queries.device.type == "cpu" else _ELSEWHERE
    together = min(rows * heads, max(1, room // (_QUERIES * m)))  # rows and heads
    at_once = min(n, max(1, room // (together * m)))  # queries
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    buffer = torch.empty(together * at_once * m, dtype=wide, device=queries.device)
    values = torch.empty(rows * heads, n, k, dtype=wide, device=queries.device)
    slots = torch.empty(rows * heads, n, k, dtype=torch.int64, device=queries.device)
    queries, keys = queries.flatten(0, 1), keys.flatten(0, 1)  # (rows · heads, n, d) and (rows · heads, m, d)
    places, before = (part.repeat_interleave(heads, dim=0)[:, None] for part in (places, before))
    for first in range(0, rows * heads, together):
        some = slice(first, first + together)
        columns = keys[some].to(wide).transpose(1, 2)  # (together, d, m)
        for start in range(0, n, at_once):
            part = slice(start, start + at_once)
            query = queries[some, part].to(wide)
            scores = buffer[: query.shape[0] * query.shape[1] * m].view(*query.shape[:2], m)
            torch.bmm(query, columns, out=scores)  # a new tensor each time would cost more than the product
            if not seen_by_all:
                unseen = (places[some] < 0) | (places[some] >= before[some, :, part].transpose(1, 2))
                scores.masked_fill_(unseen, -torch.inf)
            values[some, part], slots[some, part] = largest(scores, k)
    shape = (rows, heads, n, k)
    return slots.view(shape), values.view(shape) > -torch.inf
