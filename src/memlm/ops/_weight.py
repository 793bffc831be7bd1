"""λ, the weight of the memory, as a function of the distance d to the nearest neighbor (squared L2).

Buckets: Drozdov et al. 2022, arXiv:2210.15859, section 4. The drop-offs are memlm's own, after a question of whether an
exponential in the distance could replace them.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 1 - 1e-4  # a λ of 1 would make a token that no neighbor carries impossible


def bucket_weight(distances: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
    """Return λ of the bucket that each distance falls into: bucket b holds edges[b − 1] < d ≤ edges[b].

    Args:
        distances: To the nearest neighbor, shape (n,).
        edges: Rising, shape (buckets − 1,).
        weights: One a bucket, shape (buckets,).

    Example:
        >>> bucket_weight(torch.tensor([0.5, 1.0, 3.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.9, 0.5, 0.1]))
        tensor([0.9000, 0.9000, 0.1000])
    """
    return weights[torch.bucketize(distances, edges)]


def exponential_weight(distances: Tensor, scale: Tensor | float, length: Tensor | float) -> Tensor:
    """Return λ(d) = min(λ₀ exp(−d / τ), 1 − 10⁻⁴).

    Args:
        distances: To the nearest neighbor, shape (n,).
        scale: λ₀, positive. Above 1 where even near neighbors have d > 0, as in many dimensions.
        length: τ, in units of squared distance; positive.

    Example:
        >>> exponential_weight(torch.tensor([0.0, 2.0]), 0.8, 2.0)
        tensor([0.8000, 0.2943])
    """
    return (scale * torch.exp(-distances / length)).clamp_max(LARGEST)


def logistic_weight(distances: Tensor, scale: Tensor | float, center: Tensor | float, length: Tensor | float) -> Tensor:
    """Return λ(d) = min(λ₀ σ((c − d) / τ), 1 − 10⁻⁴).

    Args:
        distances: To the nearest neighbor, shape (n,).
        scale: λ₀ in (0, 1], what near neighbors get.
        center: c, where λ has dropped to half of λ₀.
        length: τ, in units of squared distance; positive.

    Example:
        >>> logistic_weight(torch.tensor([5.0]), 0.8, 5.0, 2.0)
        tensor([0.4000])
    """
    return (scale * torch.sigmoid((center - distances) / length)).clamp_max(LARGEST)
