"""The continuous cache (Grave, Joulin, Usunier 2017, arXiv:1612.04426), with memlm's drop-off by age."""

from __future__ import annotations

import torch
from torch import Tensor

from ._weight import LARGEST


def cache_scores(
    products: Tensor, present: Tensor, ages: Tensor, scale: Tensor | float, forgetting: Tensor | float
) -> Tensor:
    """Return the log of every entry's unnormalized weight: θ hᵀhᵢ − age / τ (eq. 3; the age is memlm's).

    Args:
        products: hᵀhᵢ, float32, shape (n, k); not used where absent.
        present: Bool, shape (n, k).
        ages: Tokens since each entry, shape (n, k).
        scale: θ, not negative.
        forgetting: 1 / τ, not negative; 0 forgets nothing.

    Returns:
        float32, shape (n, k); −inf where absent.
    """
    scores = scale * products.masked_fill(~present, 0.0) - forgetting * ages
    return scores.masked_fill(~present, -torch.inf)


def shared_softmax_weight(log_mass: Tensor, normalizer: Tensor, bias: Tensor | float) -> Tensor:
    """Return the part of one softmax over vocabulary and cache that the cache holds (eq. 5–6).

    P(w) ∝ exp(hᵀo_w) + Σᵢ 1[w = xᵢ₊₁] exp(θ hᵀhᵢ + α) is λ p_cache + (1 − λ) p_LM with
    λ = min(σ(log Σᵢ exp(θ hᵀhᵢ) + α − log Σ_w exp(hᵀo_w)), 1 − 10⁻⁴). The paper has no largest λ; in float32 σ becomes
    1 where the cache outweighs the vocabulary by 17 nats, and a token that it lacks would be impossible.

    Args:
        log_mass: log Σᵢ exp(θ hᵀhᵢ), shape (n,); −inf where the cache is empty.
        normalizer: log Σ_w exp(hᵀo_w), shape (n,).
        bias: α.

    Returns:
        λ, shape (n,); 0 where the cache is empty.
    """
    return torch.sigmoid(log_mass + bias - normalizer).clamp_max(LARGEST)
