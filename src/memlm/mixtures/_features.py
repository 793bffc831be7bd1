"""What a gate looks at: how near, how many and how much in agreement the neighbors are, and how sure the model is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ..evidence import Belief, Found

_NEAREST = 64  # neighbors whose values are compared with each other


def names(k: int) -> list[str]:
    """Return the names of the features, in their order, for k neighbors."""
    distances = [f"distance at rank {rank}" for rank in _ranks(k)]
    counts = [f"distinct values up to rank {rank}" for rank in _ranks(min(k, _NEAREST))[1:]]
    memory = ["largest p_kNN", "entropy of p_kNN", "p_kNN of the model's choice", "neighbors"]
    return [*distances, *counts, *memory, "confidence", "entropy of p_LM", "agreement"]


def features(found: Found, belief: Belief | None, temperature: float, k: int) -> Tensor:
    """Return what a network is told of n targets.

    Args:
        found: What a datastore found.
        belief: What the model thinks.
        temperature: T of p_kNN, in the features alone.
        k: Neighbors asked for; a row may have fewer.

    Returns:
        float32, shape (n, len(names(k))); finite, also in rows without neighbors.

    Raises:
        ConfigError: There is no belief.
    """
    if belief is None:
        raise ConfigError("this mixture looks at the model's confidence; retrieve with beliefs=True")
    distances, tokens, present, log_counts = _in_order(found.nearest(k))
    n = len(distances)
    ranks = [min(rank, distances.shape[1]) - 1 for rank in _ranks(k)]
    # where a row ends early, its last neighbor stands for those that are missing
    last = (present.sum(dim=1, keepdim=True) - 1).clamp_min(0)
    places = torch.tensor(ranks, device=distances.device).expand(n, -1).minimum(last)
    near = distances.gather(1, places).masked_fill(~present.any(dim=1, keepdim=True), 0.0) / temperature
    near = torch.cat([near[:, :1], (near[:, 1:] - near[:, :1]).log1p()], dim=1)

    shares = ops.knn_log_weights(distances, present, temperature=temperature, log_counts=log_counts)
    of_choice = shares.exp().mul(tokens == belief.top[:, None]).sum(dim=1)
    head = slice(0, _NEAREST)
    distinct = _distinct(tokens[:, head], present[:, head])  # (n, nearest)
    counted = [min(rank, distinct.shape[1]) - 1 for rank in _ranks(min(k, _NEAREST))[1:]]
    _, likelihoods = ops.aggregate_by_token(shares[:, head], tokens[:, head])
    likelihoods = likelihoods.exp()  # (n, nearest): of distinct values
    surprise = -(likelihoods * likelihoods.clamp_min(1e-30).log()).sum(dim=1)
    some = present.sum(dim=1)
    largest = likelihoods.amax(dim=1)
    return torch.cat(
        [
            near,
            distinct[:, counted].float().clamp_min(1).log(),
            torch.stack([largest, surprise, of_choice, (some + 1.0).log()], dim=1),
            torch.stack([belief.confidence, belief.entropy, (of_choice - belief.confidence.exp()).abs()], dim=1),
        ],
        dim=1,
    )


def _ranks(k: int) -> list[int]:
    """Return 1, 2, 4, … up to k, and k."""
    return sorted({*(1 << power for power in range(int(math.log2(k)) + 1)), k})


def _in_order(found: Found) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return distances, tokens, presence and log counts, the nearest first; searches return them so already."""
    distances = found.distances.masked_fill(~found.present, torch.inf)
    if bool((distances[:, 1:] >= distances[:, :-1]).all()):
        return distances, found.tokens, found.present, found.log_counts
    distances, order = distances.sort(dim=1)
    counts = None if found.log_counts is None else found.log_counts.gather(1, order)
    return distances, found.tokens.gather(1, order), found.present.gather(1, order), counts


def _distinct(tokens: Tensor, present: Tensor) -> Tensor:
    """Return how many different values stand up to each place of a row, int64, shape (n, k)."""
    marked = tokens.masked_fill(~present, -1)
    ordered, order = marked.sort(dim=1, stable=True)
    first = torch.ones_like(present)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.zeros_like(first).scatter_(1, order, first & (ordered >= 0))
    return first.cumsum(dim=1)
