"""Product keys: the exact top k among n² keys from 2 n scores (Lample et al. 2019, arXiv:1907.05242, section 3.2).

The keys are all pairs of a sub-key from a first and one from a second set, so that q · (c, c') = q₁ · c + q₂ · c'.
A pair whose halves rank i-th and j-th (from 1) is no better than the i j − 1 other pairs of halves that rank as high or
higher: of the k² pairs of the k best halves, only those with i j ≤ k can be among the k best.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def product_key_top_k(queries: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores and numbers of the k best of all n² slots, exactly; never in half precision.

    Args:
        queries: Shape (rows, heads, d), d even.
        sub_keys: Shape (heads, 2, n, d / 2). Slot i n + j has the key (sub_keys[h, 0, i], sub_keys[h, 1, j]).
        k: Slots to be found, from 1 to n².

    Returns:
        Dot products, falling, float32 (float64 for float64), and slots, int64, all different; both of shape
        (rows, heads, k). Which of several slots with the k-th best score are named is not defined. Gradients flow from
        the scores to queries and sub-keys.

    Raises:
        ValueError: The shapes do not fit together, or there are fewer than k slots.

    Example:
        >>> sub_keys = torch.tensor([[[[0.0], [1.0]], [[0.0], [5.0]]]])  # one head; slots 0, 5, 1 and 6
        >>> product_key_top_k(torch.ones(1, 1, 2), sub_keys, k=2)
        (tensor([[[6., 5.]]]), tensor([[[3, 1]]]))
    """
    heads, halves, n, width = sub_keys.shape
    if halves != 2 or queries.shape[1:] != (heads, 2 * width):
        raise ValueError(
            f"queries of shape {tuple(queries.shape)} do not fit sub-keys of shape {tuple(sub_keys.shape)}; expected "
            "(rows, heads, d) and (heads, 2, n, d / 2)"
        )
    if not 1 <= k <= n * n:
        raise ValueError(f"k is {k}; expected 1 to {n * n}, the number of slots")
    with torch.autocast(queries.device.type, enabled=False):
        parts = _wide(queries).unflatten(-1, (2, width))  # (rows, heads, 2, d / 2)
        scores = torch.einsum("rhcd,hcnd->rhcn", parts, _wide(sub_keys))  # (rows, heads, 2, n)
    best, places = scores.topk(min(k, n), dim=-1)
    first, second = (torch.tensor(ranks, device=queries.device) for ranks in _pairs(k, n))  # (candidates,)
    sums = best[:, :, 0].index_select(-1, first) + best[:, :, 1].index_select(-1, second)
    found, pairs = sums.topk(k, dim=-1)
    slots = places[:, :, 0].gather(-1, first[pairs]) * n + places[:, :, 1].gather(-1, second[pairs])
    return found, slots


def read_slots(values: Tensor, slots: Tensor, weights: Tensor, *, sparse_gradient: bool = False) -> Tensor:
    """Return the weighted sum of value rows, Σ_i w_i v_i (Lample et al. 2019, eq. 3), without gathering them first.

    Args:
        values: Shape (slots, width).
        slots: Rows to be read, int64, shape (rows, reads), at least one read; a slot may stand there several times.
        weights: Shape (rows, reads).
        sparse_gradient: Give the values a sparse gradient, of the rows that were read alone.

    Returns:
        Of the type of `values`, shape (rows, width).
    """
    weights = weights.to(values.dtype)
    return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum", sparse=sparse_gradient)


@cache
def _pairs(k: int, n: int) -> tuple[list[int], list[int]]:
    """Return the ranks, from 0, of the first and of the second halves of the pairs that can be among the k best."""
    last = min(k, n)
    pairs = [(i, j) for i in range(last) for j in range(min(last, k // (i + 1)))]
    return [i for i, _ in pairs], [j for _, j in pairs]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
