"""One softmax over the vocabulary and several memories (TRIME; Zhong, Lei, Chen 2022, arXiv:2205.12674, eq. 5).

P(w) ∝ exp(E_w·h) + Σ_m Σ_{j ∈ m: y_j = w} exp(sim(q, k_j) / T − age_j / τ), sim(q, k) = q·k / √d

The temperature T of inference is the paper's (appendix A), which leaves the vocabulary alone; the drop-off by age is
memlm's. The same P is Σ_m λ_m p_m + (1 − Σ_m λ_m) p_LM, with p_m the softmax of the scores in memory m.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._weight import LARGEST

_SMALLEST = float(torch.finfo(torch.float32).tiny)


def scaled_similarities(
    products: Tensor,
    present: Tensor,
    width: int,
    temperature: Tensor | float,
    ages: Tensor | None = None,
    forgetting: Tensor | float = 0.0,
    log_counts: Tensor | None = None,
) -> Tensor:
    """Return every entry's score: log s + q·k / (√d T) − age / τ.

    Args:
        products: q·k, float32, shape (n, k); not used where absent.
        present: Bool, shape (n, k).
        width: d, numbers in a key.
        temperature: T, positive.
        ages: Tokens since each entry, shape (n, k); None where entries have no age.
        forgetting: 1 / τ, not negative; 0 forgets nothing.
        log_counts: log s, s entries being merged into this one, shape (n, k); None means all 0.

    Returns:
        float32, shape (n, k); −inf where absent.

    Example:
        >>> scaled_similarities(torch.tensor([[6.0, 6.0]]), torch.tensor([[True, False]]), 4, 1.5)
        tensor([[2., -inf]])
    """
    scores = products.masked_fill(~present, 0.0) / (width**0.5 * temperature)
    if ages is not None:
        scores = scores - forgetting * ages
    if log_counts is not None:
        scores = scores + log_counts
    return scores.masked_fill(~present, -torch.inf)


def shared_softmax_weights(log_masses: Tensor, normalizer: Tensor) -> Tensor:
    """Return the part of the softmax that each memory holds: λ_m = exp(M_m) / (Σ_w exp(E_w·h) + Σ_m exp(M_m)).

    Args:
        log_masses: M_m = log Σ_j exp(score_j) of each memory, shape (n, memories); −inf where it is empty.
        normalizer: log Σ_w exp(E_w·h), finite, shape (n,).

    Returns:
        λ, shape (n, memories); 0 where a memory is empty. Rounded, a row may sum to 1; see `capped`.

    Example:
        >>> shared_softmax_weights(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0.0]))
        tensor([[0.5000, 0.0000]])
    """
    return torch.cat([log_masses, normalizer[:, None]], dim=1).softmax(dim=1)[:, :-1]


def second_interpolation(
    weights: Tensor, log_shares: Tensor, place: int, again: Tensor, again_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix one memory in once more: P_final = (1 − λ') P + λ' P' (Zhong et al. 2022, appendix A).

    P' is another distribution over the same neighbors, so that P_final has other weights and other shares of that
    memory, and the form of P.

    Args:
        weights: λ of each memory in P, shape (n, memories).
        log_shares: Log of the neighbors' shares in that memory's part of P, shape (n, k).
        place: Of that memory.
        again: Log of their shares in P', shape (n, k).
        again_weight: λ', shape (n,); 0 where that memory is empty.

    Returns:
        The weights and that memory's log shares in P_final; shapes as above.
    """
    rest = (1 - again_weight)[:, None] * weights
    parts = torch.stack([rest[:, place], again_weight], dim=1).log()  # (n, 2)
    joined = torch.logaddexp(log_shares + parts[:, :1], again + parts[:, 1:])
    total = rest[:, place] + again_weight
    rest[:, place] = total
    return rest, joined - total.clamp_min(_SMALLEST).log()[:, None]


def capped(weights: Tensor) -> Tensor:
    """Return weights, shape (n, memories), scaled down where their sum is above 1 − 10⁻⁴.

    Example:
        >>> capped(torch.tensor([[0.5, 0.5], [0.2, 0.1]])).sum(dim=1)
        tensor([0.9999, 0.3000])
    """
    return weights * (LARGEST / weights.sum(dim=1, keepdim=True).clamp_min(LARGEST))
