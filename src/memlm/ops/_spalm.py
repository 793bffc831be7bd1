"""A gate between the model's last state and the neighbors' next tokens (SPALM, Yogatama et al. 2021, arXiv:2102.02557).

m = Σ_i softmax_i(e(y_i) · h) e(y_i),  z = (1 − g) ⊙ s m + g ⊙ h,  p = softmax(W z)

h is what the output embedding reads, e(y) the embedding of the token y there, and s the size of m: 1 where the whole
model is trained. `steering` is another way to z, not the paper's; see `SteeredMixture`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The score of a neighbor that is not there. Finite, because a softmax over nothing but −∞ has no gradient.
_NOTHING = -1e30
_APART = 1e-2  # of an embedding's own square: by what steps give way where two can hardly be told apart


def spalm_memory(
    hidden: Tensor, embeddings: Tensor, present: Tensor, log_counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what the neighbors' next tokens say together, and the share that each of them has in it.

    Tokens that come more than once count as often.

    Args:
        hidden: h, shape (n, d).
        embeddings: e(y_i) of the neighbors' next tokens, shape (n, k, d).
        present: Bool, shape (n, k).
        log_counts: Log of how many entries a neighbor stands for, shape (n, k), as often as which it counts; None
            means all 0.

    Returns:
        (m, log shares): shapes (n, d) and (n, k); in a row without neighbors m is 0 and no share is anything.

    Example:
        >>> hidden, present = torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]])
        >>> memory, log_shares = spalm_memory(hidden, torch.eye(2)[None], present)
        >>> memory, log_shares.exp()
        (tensor([[1., 0.]]), tensor([[1., 0.]]))
    """
    scores = torch.einsum("nkd,nd->nk", embeddings, hidden)  # (n, k)
    scores = scores if log_counts is None else scores + log_counts
    scores = scores.masked_fill(~present, _NOTHING)
    log_shares = scores.log_softmax(dim=1)
    memory = torch.einsum("nk,nkd->nd", log_shares.exp() * present, embeddings)
    return memory, log_shares.masked_fill(~present, -torch.inf)


def spalm_state(hidden: Tensor, memory: Tensor, gate: Tensor, present: Tensor) -> Tensor:
    """Return z = (1 − g) ⊙ m + g ⊙ h, shape (n, d); z is h in rows without neighbors.

    Args:
        hidden: h, shape (n, d).
        memory: s m, shape (n, d).
        gate: g, shape (n, 1), or (n, d) for one gate a dimension, from 0 (memory alone) to 1 (the model alone).
        present: Bool, shape (n, k).
    """
    return torch.where(present.any(dim=1, keepdim=True), (1 - gate) * memory + gate * hidden, hidden)


def steering(
    log_odds: Tensor,
    log_shares: Tensor,
    tokens: Tensor,
    present: Tensor,
    log_probs: Tensor,
    embeddings: Tensor,
    metric: Tensor,
) -> Tensor:
    """Return the change of a state that raises the logit of each neighbor's next token y by
    b_y = log(1 + λ / (1 − λ) · q(y) / p_LM(y)), and all logits together, by least squares, as little as that allows.

    If no other logit changed at all, softmax would turn p_LM(y) into (p_LM(y) + λ / (1 − λ) q(y)) / Z: interpolation
    with weight λ. With E the embeddings of the distinct tokens, one a row, the change is A Eᵀ (E A Eᵀ)⁻¹ b.

    Args:
        log_odds: log λ / (1 − λ), shape (n,).
        log_shares: Log of each neighbor's share in q, shape (n, k).
        tokens: The neighbors' next tokens, int64, shape (n, k).
        present: Bool, shape (n, k).
        log_probs: log p_LM of those tokens, shape (n, k).
        embeddings: e of those tokens, shape (n, k, d).
        metric: A, the inverse of WᵀW up to a factor, shape (d, d).

    Returns:
        Shape (n, d); 0 in rows without neighbors.
    """
    same = (tokens[:, :, None] == tokens[:, None, :]) & present[:, None, :] & present[:, :, None]  # (n, k, k)
    first = present & ~same.tril(-1).any(dim=2)  # a token that comes more than once is one
    log_q = (log_shares.exp().masked_fill(~present, 0.0)[:, None, :] * same).sum(dim=2).clamp_min(1e-30).log()
    steps = torch.nn.functional.softplus(log_odds[:, None] + log_q - log_probs.clamp_min(-30)) * first  # b, (n, k)
    distinct = embeddings * first[..., None]  # E
    moved = distinct @ metric  # (n, k, d): E A
    inner = moved @ distinct.transpose(1, 2)  # (n, k, k): E A Eᵀ
    # a row that is none gets 1; the ridge keeps tokens apart whose embeddings are nearly the same
    diagonal = inner.diagonal(dim1=1, dim2=2)
    inner = inner + torch.diag_embed(torch.where(first, _APART * diagonal + 1e-12, 1.0))
    return (torch.linalg.solve(inner, steps)[:, None, :] @ moved)[:, 0]
