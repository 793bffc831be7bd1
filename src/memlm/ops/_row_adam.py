"""Adam for a few rows of a large table (Kingma and Ba 2015, arXiv:1412.6980), with one second moment a row.

Moments and the bias correction of a row count its own updates alone: a row that no batch touches stays as it is. The
second moment is that of the mean of the squared gradients of the row, which takes one number in the place of its width.
"""

from __future__ import annotations

from torch import Tensor


def row_adam(
    rows: Tensor,
    gradients: Tensor,
    moments: Tensor,
    squares: Tensor,
    steps: Tensor,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows, moments, squares and steps after one update of every row; algorithm 1 of the paper, row by row.

    Args:
        rows: Shape (n, width).
        gradients: Shape (n, width).
        moments: Moving mean of gradients, shape (n, width).
        squares: Moving mean of the rows' mean squared gradients, shape (n,).
        steps: Updates that each row has had, shape (n,).
        learning_rate: Step size.
        betas: Decay of moments and squares.
        epsilon: Keeps the quotient finite.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> row_adam(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2), zero, zero, 0.1)[0]
        tensor([[0.9000, 0.9000]])
    """
    first, second = betas
    steps = steps + 1
    moments = first * moments + (1 - first) * gradients
    squares = second * squares + (1 - second) * gradients.square().mean(dim=1)
    deviation = (squares / (1 - second**steps)).sqrt() + epsilon  # (n,)
    rate = learning_rate / (1 - first**steps) / deviation
    return rows - rate[:, None] * moments, moments, squares, steps
