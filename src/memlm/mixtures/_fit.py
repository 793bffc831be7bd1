"""Fitting λ to held-out text by likelihood.

Everything is fitted to the ratio r = p_kNN / p_LM of the targets: the mixture's log-likelihood is
Σ log p_LM + log(1 + λ (r − 1)). Rows without neighbors have λ = 0 whatever is fitted; they must be left out, or have
r = 1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ._folds import folds

_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_NO_DROP_OFF = 1e6  # τ / typical distance at which λ no longer falls
_STEEPEST = 60.0  # median distance / τ, at most: λ₀ must fit into a float32
_LARGEST_LOG = 66.0  # of λ₀, for the same reason
_FARTHEST = 14.0  # log of τ / typical distance, in size: a step of the descent may go very far


def gain(ratio: Tensor, weight: Tensor | float) -> Tensor:
    """Return log(p / p_LM) of every target, the same shape as `ratio`."""
    return torch.log1p(weight * (ratio - 1))


def best_weight(ratio: Tensor, steps: int = 24) -> float:
    """Return the λ in [0, 1 − 10⁻⁴] that maximizes Σ log(1 + λ (r − 1)), r = p_kNN / p_LM; the sum is concave in λ.

    Example:
        >>> best_weight(torch.tensor([2.0, 0.0])), best_weight(torch.tensor([0.5]))
        (0.0, 0.0)
    """
    excess = ratio - 1

    def slope(weight: float) -> float:
        return float((excess / (1 + weight * excess).clamp_min(1e-12)).sum())

    # λ = 1 would make a token that the memory lacks impossible; held-out text may not hold one such by chance
    if slope(0.0) <= 0:
        return 0.0
    low, high = 0.0, ops.LARGEST
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


def fit_buckets(ratio: Tensor, distances: Tensor, buckets: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the edges of equally populated buckets and the best λ in each.

    Args:
        ratio: p_kNN / p_LM, float64, shape (n,).
        distances: To the nearest neighbor, finite, shape (n,).
        buckets: Wanted; fewer where many distances are equal.
    """
    inner = torch.linspace(0, 1, buckets + 1, dtype=torch.float64)[1:-1]
    edges = distances.double().quantile(inner).float().unique() if buckets > 1 else distances[:0].float()
    place = torch.bucketize(distances.float(), edges)
    return tuple(edges.tolist()), tuple(best_weight(ratio[place == number]) for number in range(len(edges) + 1))


def choose_buckets(ratio: Tensor, distances: Tensor, groups: np.ndarray) -> int:
    """Return the number of buckets with the best likelihood in cross-validation over groups of tokens, shape (n,)."""
    splits = [(torch.from_numpy(fitted), torch.from_numpy(held)) for fitted, held in folds(groups)]
    scores = []
    for buckets in _BUCKETS:
        total = 0.0
        for kept, tested in splits:
            edges, weights = fit_buckets(ratio[kept], distances[kept], buckets)
            weight = ops.bucket_weight(distances[tested].float(), torch.tensor(edges), torch.tensor(weights))
            total += float(gain(ratio[tested], weight.double()).sum())
        scores.append(total)
    return _BUCKETS[int(np.argmax(scores))]


def fit_exponential(ratio: Tensor, distances: Tensor) -> tuple[float, float]:
    """Return (λ₀, τ) of λ(d) = min(λ₀ exp(−d / τ), 1 − 10⁻⁴).

    Starts with a long τ, from λ at the median distance; λ₀ is held as λ at the median, so that the two do not fight.
    """
    middle = _typical(distances)
    start = max(best_weight(ratio), 1e-3)

    def read(parameters: Tensor) -> tuple[Tensor, Tensor]:
        inverse = parameters[1].clamp_min(-_FARTHEST).exp().clamp_max(_STEEPEST)
        return parameters[0].clamp_min(-_LARGEST_LOG).minimum(_LARGEST_LOG - inverse).exp(), inverse

    def weight(parameters: Tensor) -> Tensor:
        at_middle, inverse = read(parameters)
        return (at_middle * torch.exp((middle - distances.double()) / middle * inverse)).clamp_max(ops.LARGEST)

    starts = [[np.log(start), np.log(inverse)] for inverse in (1e-6, 0.1, 0.5, 2.0)]
    best, loss = descend(lambda parameters: -gain(ratio, weight(parameters)).mean(), starts)
    constant = best_weight(ratio)
    if -loss < float(gain(ratio, constant).mean()):  # no drop-off is one, too
        return max(constant, 1e-6), _NO_DROP_OFF * middle
    at_middle, inverse = (float(value) for value in read(best))
    return at_middle * float(np.exp(inverse)), middle / inverse


def fit_logistic(ratio: Tensor, distances: Tensor) -> tuple[float, float, float]:
    """Return (λ₀, c, τ) of λ(d) = min(λ₀ σ((c − d) / τ), 1 − 10⁻⁴)."""
    middle = _typical(distances)
    start = min(max(best_weight(ratio), 0.02), 0.98)

    def read(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = parameters[0].clamp(-_LARGEST_LOG, _LARGEST_LOG).sigmoid()
        center = parameters[1].clamp(-20 * _NO_DROP_OFF, 20 * _NO_DROP_OFF)
        return scale, center * middle, parameters[2].clamp(-_FARTHEST, _FARTHEST).exp() * middle

    def weight(parameters: Tensor) -> Tensor:
        scale, center, length = read(parameters)
        return ops.logistic_weight(distances.double(), scale, center, length)

    logit = np.log(start / (1 - start))
    starts = [[logit + 1, center, np.log(length)] for center in (1.0, 2.0) for length in (0.2, 1.0)]
    best, loss = descend(lambda parameters: -gain(ratio, weight(parameters)).mean(), starts)
    constant = best_weight(ratio)
    if -loss < float(gain(ratio, constant).mean()):
        return max(constant, 1e-6), 20 * _NO_DROP_OFF * middle, _NO_DROP_OFF * middle  # σ(20) is 1 in a float32
    scale, center, length = (float(value) for value in read(best))
    return scale, center, length


def _typical(distances: Tensor) -> float:
    """Return the median of the distances above zero; many may be zero, where text is stored that is asked for."""
    positive = distances[distances > 0]
    return max(float(positive.median()), 1e-9) if len(positive) else 1.0


def descend(loss: Callable[[Tensor], Tensor], starts: list[list[float]], *, steps: int = 100) -> tuple[Tensor, float]:
    """Return the parameters, of those seen by L-BFGS from several starts, with the least loss, and that.

    Args:
        loss: Of a few parameters, float64, shape (parameters,); where it is not a number is never the best.
        starts: Where to begin, at least one.
        steps: At most, from each.
    """
    best, least = torch.tensor(starts[0], dtype=torch.float64), np.inf
    for start in starts:
        parameters = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([parameters], max_iter=steps, line_search_fn="strong_wolfe")

        def closure(parameters: Tensor = parameters, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            nonlocal best, least
            optimizer.zero_grad()
            value = loss(parameters)
            value.backward()
            if float(value.detach()) < least:
                best, least = parameters.detach().clone(), float(value.detach())
            return value

        optimizer.step(closure)
    return best, least
