"""One softmax over vocabulary and memory (TRIME, Zhong, Lei, Chen 2022, arXiv:2205.12674, eq. 5).

P(w | c) ∝ exp(E_w · h) + Σ_{j ∈ M: y_j = w} exp(sim(f, f_j)),  sim(a, b) = a · b / √d

The memory M is shared by all queries, and a mask says which entries each of them may see.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._knn import _scatter_logsumexp

# The score of what may not be seen. Finite, because a logsumexp over nothing but −∞ has no gradient; its exponential
# is zero, so that an empty memory leaves the model's own numbers untouched.
_NOTHING = -1e30


def similarities(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the scaled dot products q · k / √d, never in half precision, also under autocast.

    Args:
        queries: Shape (n, d).
        keys: Shape (m, d).

    Returns:
        float32 (float64 for float64), shape (n, m). Gradients flow to queries and keys.

    Example:
        >>> similarities(torch.ones(1, 4), torch.ones(2, 4))
        tensor([[2., 2.]])
    """
    with torch.autocast(queries.device.type, enabled=False):
        return _wide(queries) @ _wide(keys).T / math.sqrt(keys.shape[-1])


def trime_log_probs(
    logits: Tensor,
    similarities: Tensor,
    allowed: Tensor,
    memory_tokens: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Return log P of one token a row, without ever making a row of vocabulary and memory.

    log P(y) = logaddexp(z_y, log Σ_{y_j = y} exp(s_j / τ)) − logaddexp(log Σ_w exp(z_w), log Σ_j exp(s_j / τ))

    Args:
        logits: The model's own, shape (n, vocabulary); not divided by the temperature.
        similarities: Of every query with every entry of the memory, shape (n, m).
        allowed: Which entries each query may see, bool, shape (n, m).
        memory_tokens: The entries' tokens, int64, shape (m,).
        targets: The token asked for, int64, shape (n,).
        temperature: τ of the memory, positive; 1 in training.

    Returns:
        Natural logs, float32 (float64 for float64), shape (n,): the model's log-softmax where nothing is allowed, with
        finite gradients.

    Raises:
        ValueError: The temperature is not a positive number.

    Example:
        >>> one = torch.tensor([[True]])
        >>> trime_log_probs(torch.zeros(1, 2), torch.zeros(1, 1), one, torch.tensor([1]), torch.tensor([1])).exp()
        tensor([0.6667])
    """
    logits, scores = _wide(logits), _scores(similarities, allowed, temperature)
    same = scores.masked_fill(memory_tokens != targets[:, None], _NOTHING)
    target = logits.gather(1, targets[:, None]).squeeze(1)
    return torch.logaddexp(target, same.logsumexp(dim=1)) - _normalizer(logits, scores)


def trime_distribution(
    logits: Tensor, similarities: Tensor, allowed: Tensor, memory_tokens: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return log P of the whole vocabulary, float32, shape (n, vocabulary); arguments as in `trime_log_probs`."""
    logits, scores = _wide(logits), _scores(similarities, allowed, temperature)
    mass = _scatter_logsumexp(scores, memory_tokens.expand_as(scores), logits.shape[1])  # (n, vocabulary)
    return torch.logaddexp(logits, mass) - _normalizer(logits, scores)[:, None]


def _scores(similarities: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    return (_wide(similarities) / temperature).masked_fill(~allowed, _NOTHING)


def _normalizer(logits: Tensor, scores: Tensor) -> Tensor:
    return torch.logaddexp(logits.logsumexp(dim=1), scores.logsumexp(dim=1))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
