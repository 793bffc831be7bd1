"""The corrections of a kNN-Adapter (Huang et al. 2023, arXiv:2302.10879): p_kNN reshaped, target by target.

The paper learns λ and a temperature. The bias is memlm's: a heavy tail, which lets many far neighbors speak where the
nearest are few, in the place of a softmax that has forgotten them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adapted_log_weights(
    distances: Tensor,
    present: Tensor,
    temperature: float,
    sharpness: Tensor,
    tail: Tensor,
    log_counts: Tensor | None = None,
) -> Tensor:
    """Return the log share of every neighbor: log softmax(log c − s (d − d₁) / T − b log(1 + (d − d₁) / T)).

    Args:
        distances: Squared L2, float32, shape (n, k); not used where absent. d₁ is the smallest of a row.
        present: Bool, shape (n, k).
        temperature: T, positive.
        sharpness: s of every target, not negative, shape (n,).
        tail: b of every target, shape (n,).
        log_counts: log c, c entries being merged into the neighbor, shape (n, k); None means all 0.

    Returns:
        Natural logs, float32, shape (n, k): −inf where absent, and a whole row of −inf where no neighbor is present.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> adapted_log_weights(torch.tensor([[0.0, 1.0]]), torch.tensor([[True, True]]), 1.0, zero, one).exp()
        tensor([[0.6667, 0.3333]])
    """
    distances = distances.masked_fill(~present, torch.inf)
    nearest = distances.amin(dim=-1, keepdim=True)
    # cut off, so that a small temperature cannot make a score ∞ − ∞
    beyond = ((distances - nearest) / temperature).masked_fill(~present, 0.0).clamp_max(1e30)  # (n, k)
    scores = -sharpness[:, None] * beyond - tail[:, None] * beyond.log1p()
    scores = scores if log_counts is None else scores + log_counts
    some = present.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~present & some, -torch.inf)  # a softmax over nothing would be NaN
    return scores.log_softmax(dim=-1).masked_fill(~present, -torch.inf)
