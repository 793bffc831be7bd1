"""Attention to a memory beside the attention to the text at hand (Wu et al. 2022, arXiv:2203.08913, section 3).

A query's attention to what was found in memory is a softmax of its own, y_m = Σ_i softmax_i(s_i) v_i. It is joined with
the local attention's output y by a weight λ in [0, 1], y + λ (y_m − y); ways to combine differ in λ alone:

- joint softmax: one softmax over both, λ = Σ_m exp(s) / (Σ_m exp(s) + Σ_local exp(s)); the later code of the paper's
  authors, and Tworkowski et al. 2023 (arXiv:2307.03170).
- gate: λ = σ(b), one number a head; the paper's eq. 1 (there the gate is the memory's weight as well).
- null slot: λ = Σ_m exp(s) / (Σ_m exp(s) + exp(n)), one n a head; what is unlike everything in memory stays with y.

In all three, λ = 0 where nothing was found.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The score of what may not be seen: finite, because a logsumexp over nothing but −∞ has no gradient
_NOTHING = -1e30


def recalled_scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return scale · q · k of every query with its own neighbors, at least float32.

    Args:
        queries: Shape (…, n, d).
        keys: What each found, shape (…, n, k, d).
        scale: Of products.

    Returns:
        Shape (…, n, k).
    """
    return _wide((keys @ queries[..., None])[..., 0]) * scale


def age_drop_off(scores: Tensor, ages: Tensor, forgetting: Tensor) -> Tensor:
    """Return s − age · f: what was read long ago counts exponentially less.

    Args:
        scores: Shape (batch, heads, n, k).
        ages: Tokens since each entry, of the same shape.
        forgetting: f of each head, shape (heads,), not negative.
    """
    return scores - forgetting[:, None, None] * ages


def memory_attention(scores: Tensor, present: Tensor, values: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Attend to what was found.

    Args:
        scores: Shape (…, n, k).
        present: Bool, shape (…, n, k).
        values: Shape (…, n, k, d).
        dropout: Part of the softmax's weights that is left out.

    Returns:
        y_m, shape (…, n, d) in the type of the values, and log Σ exp(s), shape (…, n) in that of the scores: zero and
        below −10²⁹ where nothing is present.

    Example:
        >>> scores, present = torch.zeros(1, 2), torch.tensor([[True, False]])
        >>> memory_attention(scores, present, torch.tensor([[[3.0], [9.0]]]))
        (tensor([[3.]]), tensor([0.]))
    """
    scores = scores.masked_fill(~present, _NOTHING)
    shares = scores.softmax(dim=-1).masked_fill(~present, 0.0).to(values.dtype)
    shares = torch.dropout(shares, dropout, train=dropout > 0)
    return (shares[..., None, :] @ values)[..., 0, :], scores.logsumexp(dim=-1)


def local_log_mass(
    queries: Tensor, keys: Tensor, scale: float, mask: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Return log Σ exp(scale · q · k) over the keys that each query sees.

    Args:
        queries: Shape (batch, heads, n, d).
        keys: Shape (batch, key heads, m, d); heads are a multiple of key heads.
        scale: Of products.
        mask: Bool (True: seen) or added to scores, shape (batch or 1, 1 or heads, n, m); None is causal, the last
            query standing at the last key.
        cap: c of c · tanh(s / c), or None.

    Returns:
        At least float32, shape (batch, heads, n).

    Example:
        >>> local_log_mass(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 1.0).exp()
        tensor([[[1., 2.]]])
    """
    groups = queries.shape[1] // keys.shape[1]
    grouped = queries.unflatten(1, (keys.shape[1], groups)).flatten(2, 3)  # (batch, key heads, groups · n, d)
    scores = _wide(grouped @ keys.transpose(-1, -2)) * scale
    scores = scores.unflatten(2, (groups, -1)).flatten(1, 2)  # (batch, heads, n, m)
    if cap is not None:
        scores = cap * (scores / cap).tanh()
    if mask is None:
        n, m = scores.shape[-2:]
        mask = torch.ones(n, m, dtype=torch.bool, device=scores.device).tril(m - n)
    scores = scores.masked_fill(~mask, _NOTHING) if mask.dtype == torch.bool else scores + mask
    return scores.logsumexp(dim=-1)


def joint_softmax_weight(memory_log_mass: Tensor, local_log_mass: Tensor) -> Tensor:
    """Return the part of one softmax over memory and text that the memory holds; all of shape (batch, heads, n).

    Example:
        >>> joint_softmax_weight(torch.tensor(3.0).log(), torch.tensor(1.0).log())
        tensor(0.7500)
    """
    return (memory_log_mass - local_log_mass).sigmoid()


def null_slot_weight(memory_log_mass: Tensor, null: Tensor) -> Tensor:
    """Return the part of a softmax over memory and an empty slot, of score n, shape (heads,), that the memory holds."""
    return (memory_log_mass - null[:, None]).sigmoid()


def gate_weight(memory_log_mass: Tensor, gate: Tensor) -> Tensor:
    """Return σ(b) with b of shape (heads,), and 0 where nothing was found."""
    return gate.sigmoid()[:, None] * (memory_log_mass > 0.5 * _NOTHING)


def mix_attention(local: Tensor, memory: Tensor, weight: Tensor) -> Tensor:
    """Return y + λ (y_m − y): y itself, bit for bit, where λ is 0.

    Args:
        local: y, shape (batch, heads, n, d).
        memory: y_m, of the same shape.
        weight: λ, shape (batch, heads, n).
    """
    return local + weight[..., None].to(local.dtype) * (memory.to(local.dtype) - local)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
