"""From neighbors to a next-token distribution (Khandelwal et al. 2020, arXiv:1911.00172, eq. 2).

p_kNN(y | x) ∝ Σ_{(k_i, v_i) ∈ N} 1[y = v_i] s_i exp(−d(k_i, f(x)) / T)

with d the squared L2 distance; the temperature T divides distances. s_i is how many entries neighbor i stands for: 1
unless others were merged into it (He, Neubig, Berg-Kirkpatrick 2021, arXiv:2109.04212, section 4.2). Absent neighbors
are a mask, never a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SMALLEST = float(torch.finfo(torch.float32).tiny)


def knn_log_weights(
    distances: Tensor, present: Tensor | None = None, *, temperature: float = 1.0, log_counts: Tensor | None = None
) -> Tensor:
    """Return the log share of every neighbor in its row: log softmax(log s − d / T) over those present.

    Args:
        distances: Squared L2, float, shape (n, k); not used where `present` is False.
        present: Bool, shape (n, k); None means all.
        temperature: T, in units of squared distance; positive.
        log_counts: log s, shape (n, k); None means all 0.

    Returns:
        Natural logs, float32, shape (n, k): −inf where absent, and a whole row of −inf where no neighbor is present.

    Raises:
        ValueError: The temperature is not a positive number.

    Example:
        >>> knn_log_weights(torch.tensor([[0.0, 0.0]])).exp().tolist()
        [[0.5, 0.5]]
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    distances = distances.float()
    if present is not None:
        distances = distances.masked_fill(~present, torch.inf)
    nearest = distances.amin(dim=-1, keepdim=True)
    # Relative to the nearest, so that a small temperature cannot make every score −inf.
    scores = (nearest - distances) / max(temperature, _SMALLEST)
    scores = scores.masked_fill(nearest.isinf(), 0.0)  # a row without neighbors: a softmax over nothing would be NaN
    if log_counts is not None:
        scores = scores + log_counts
    return scores.log_softmax(dim=-1).masked_fill(distances.isinf(), -torch.inf)


def knn_target_log_probs(log_weights: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return log p_kNN of one token a row, without ever making the whole distribution.

    Args:
        log_weights: From `knn_log_weights`, shape (n, k).
        tokens: The neighbors' values, integers, shape (n, k).
        targets: The token asked for, integers, shape (n,).

    Returns:
        Natural logs, float32, shape (n,); −inf where no neighbor carries the target.
    """
    matches = tokens == targets[:, None]
    return log_weights.masked_fill(~matches, -torch.inf).logsumexp(dim=-1)


def knn_log_probs(log_weights: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """Return the whole distribution log p_kNN.

    Args:
        log_weights: From `knn_log_weights`, shape (n, k).
        tokens: The neighbors' values, int64, shape (n, k), in [0, vocab_size).
        vocab_size: Width of the result.

    Returns:
        Natural logs, float32, shape (n, vocab_size); −inf for tokens that no neighbor carries.

    Example:
        >>> weights = knn_log_weights(torch.tensor([[0.0, 0.0]]))
        >>> knn_log_probs(weights, torch.tensor([[1, 1]]), vocab_size=3).exp().tolist()
        [[0.0, 1.0, 0.0]]
    """
    return _scatter_logsumexp(log_weights, tokens, vocab_size)


def aggregate_by_token(log_weights: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the neighbors that carry the same token.

    Args:
        log_weights: From `knn_log_weights`, shape (n, k).
        tokens: Int64, shape (n, k).

    Returns:
        Each row's tokens in rising order, without repetition, and their log p_kNN, both of shape (n, k). Places left
        over at a row's end repeat its last token with log probability −inf.
    """
    ordered, order = tokens.sort(dim=-1)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = is_new.cumsum(dim=-1) - 1  # (n, k): rank of the token among the distinct ones of its row
    distinct = ordered[:, -1:].repeat(1, ordered.shape[1]).scatter_(1, place, ordered)
    return distinct, _scatter_logsumexp(log_weights.gather(1, order), place, tokens.shape[1])


def _scatter_logsumexp(values: Tensor, places: Tensor, width: int) -> Tensor:
    """Return the logsumexp of the values (n, k) that go to the same place, shape (n, width); −inf where none goes."""
    largest = values.new_full((len(values), width), -torch.inf)
    largest.scatter_reduce_(1, places, values.detach(), reduce="amax")
    largest = largest.masked_fill(largest.isinf(), 0.0)
    # Relative to the largest: a share too small for a float32 still has a logarithm.
    return torch.zeros_like(largest).scatter_add_(1, places, (values - largest.gather(1, places)).exp()).log() + largest
