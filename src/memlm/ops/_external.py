"""Reading rows of a table outside the model: attention over the rows found, where nothing is one of them.

Attention over retrieved rows is that of Wu et al. 2022 (arXiv:2203.08913, section 3.2); the row that is nothing takes
the place of its gate, so that how much is read depends on how near the rows are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def read_rows(
    queries: Tensor, keys: Tensor, values: Tensor, present: Tensor, scale: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """Return Σ w_i v_i with (w_0, w) = softmax(0, s (q · k_i − θ)), and what is read in all, 1 − w_0.

    A row whose similarity is θ weighs as much as nothing.

    Args:
        queries: Shape (n, key width).
        keys: Of the rows found, shape (n, k, key width).
        values: Shape (n, k, value width).
        present: Bool, shape (n, k).
        scale: s, a number.
        threshold: θ, a number.

    Returns:
        Shapes (n, value width) and (n,); zero where no row is present.

    Example:
        >>> one, row = torch.ones(1, 1), torch.ones(1, 1, 1)
        >>> read_rows(one, row, 8 * row, torch.tensor([[True]]), torch.tensor(5.0), torch.tensor(1.0))
        (tensor([[4.]]), tensor([0.5000]))
    """
    scores = scale * (torch.einsum("nw,nkw->nk", queries, keys) - threshold)
    scores = scores.masked_fill(~present, -torch.inf)
    weights = torch.nn.functional.pad(scores, (1, 0)).softmax(dim=-1)[:, 1:]  # (n, k)
    return torch.einsum("nk,nkv->nv", weights, values.masked_fill(~present[..., None], 0.0)), weights.sum(dim=-1)
