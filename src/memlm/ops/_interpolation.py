"""Mixing memory and model in log space (Khandelwal et al. 2020, arXiv:1911.00172, eq. 3).

p(y | x) = λ p_kNN(y | x) + (1 − λ) p_LM(y | x)

λ, the interpolation weight, is the weight of the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(lm_log_probs: Tensor, knn_log_probs: Tensor, interpolation_weight: Tensor | float) -> Tensor:
    """Return log(λ p_kNN + (1 − λ) p_LM), elementwise.

    Args:
        lm_log_probs: Natural logs, any shape.
        knn_log_probs: Natural logs, same shape; −inf is a probability of zero.
        interpolation_weight: λ in [0, 1], a number or a tensor that broadcasts. The caller sets it to 0 in rows
            without neighbors: their p_kNN is no distribution, and mixing it in would lose probability.

    Returns:
        Natural logs, same shape.

    Example:
        >>> interpolate(torch.tensor([0.5]).log(), torch.tensor([1.0]).log(), 0.5).exp().tolist()
        [0.75]
    """
    weight = torch.as_tensor(interpolation_weight, dtype=lm_log_probs.dtype, device=lm_log_probs.device)
    # logaddexp(-inf, -inf) is -inf in the forward pass, which is right: both say impossible
    return torch.logaddexp(lm_log_probs + torch.log1p(-weight), knn_log_probs + weight.log())


def interpolate_sparse(
    lm_log_probs: Tensor, tokens: Tensor, knn_log_probs: Tensor, interpolation_weight: Tensor
) -> Tensor:
    """Return the mixture over the whole vocabulary, touching only the tokens that the memory names.

    Args:
        lm_log_probs: Natural logs, shape (n, vocabulary).
        tokens: Distinct tokens a row from `aggregate_by_token`, int64, shape (n, k).
        knn_log_probs: Their log p_kNN, shape (n, k); −inf in places left over.
        interpolation_weight: λ of every row, shape (n,); 0 in rows without neighbors.

    Returns:
        Natural logs, shape (n, vocabulary).
    """
    weight = interpolation_weight.to(lm_log_probs.dtype)[:, None]  # (n, 1)
    mixed = interpolate(lm_log_probs.gather(1, tokens), knn_log_probs, weight)  # (n, k)
    result = lm_log_probs + torch.log1p(-weight)
    # A place left over repeats the row's last token: it may only raise what is there, never undo it.
    return result.scatter_reduce_(1, tokens, mixed, reduce="amax")
