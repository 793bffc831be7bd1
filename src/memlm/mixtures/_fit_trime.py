"""Fitting one softmax over vocabulary and memories: T, the drop-off by age and the second interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..evidence import Found
from ._cache import known_normalizer
from ._fit import descend
from ._heldout import HeldOut
from ._trime import TrimeMixture

_SCORES = 1 << 22  # in the sample that the descent looks at
_MOST, _LEAST = 4096, 512  # targets in it
_STEPS = 30
_AGE = 500.0  # tokens, to start with
_GRID = (-2.0, -1.0, 0.0, 1.0, 2.0)  # log of temperatures to start with, relative to the typical one
_FARTHEST = 15.0  # log of a temperature and of 1 / τ, in size: a step of the descent may go very far
_SHORTEST = 4.0  # log of 1 / τ, at most: then only the last token is remembered
_WORTH = 1e-3  # nats a token that the second interpolation must gain


def fit_trime(held: HeldOut, *, forgets: bool = True, interpolates: bool = True) -> TrimeMixture:
    """Fit T, and what else there is a memory for, by likelihood.

    Args:
        held: Evidence of a datastore searched by inner product, of a cache, or of both in this order, with beliefs. The
            mixture looks at as many neighbors of each.
        forgets: Fit the cache's drop-off by age, too.
        interpolates: Fit the second interpolation with the datastore, too; it is left out where it gains less than a
            thousandth of a nat a token.
    """
    sample = _sample(held)
    memories = held.evidence.memories
    sizes = {"length" if found.ages is not None else "k": found.tokens.shape[1] for found in memories}
    typical = math.log(_typical_temperature(sample))
    around = [0.0, *(typical + step for step in _GRID)]  # T is 1 in training

    def read(parameters: Tensor) -> dict[str, Tensor]:
        named = {"temperature": parameters[0].clamp(-_FARTHEST, _FARTHEST).exp()}
        if forgets and "length" in sizes:
            named["forgetting"] = parameters[1].clamp(-_FARTHEST, _SHORTEST).exp()
        if len(parameters) > 2:
            named["interpolation_weight"] = parameters[2].sigmoid().clamp_max(ops.LARGEST)
            named["interpolation_temperature"] = parameters[3].clamp(-_FARTHEST, _FARTHEST).exp()
        return named

    def loss(parameters: Tensor) -> Tensor:
        return -log_likelihood(sample, **read(parameters)).mean()

    best, least = _descend(loss, [[temperature, -math.log(_AGE)] for temperature in around])
    if interpolates and "k" in sizes:
        again, still_less = _descend(loss, [[*best.tolist(), -2.0, temperature] for temperature in around])
        best = again if still_less < least - _WORTH else best
    settings: dict[str, Any] = {name: float(value) for name, value in read(best).items()}
    return TrimeMixture(**sizes, **settings)


def log_likelihood(
    held: HeldOut,
    temperature: Tensor,
    forgetting: Tensor | float = 0.0,
    interpolation_weight: Tensor | None = None,
    interpolation_temperature: Tensor | float = 1.0,
) -> Tensor:
    """Return log P of every target, shape (n,), with finite gradients; see `TrimeMixture` for the settings."""
    belief = held.evidence.belief
    normalizer = known_normalizer(belief)
    assert belief is not None
    width = belief.keys.shape[1]
    # the target's own logit first: a logsumexp over nothing has no gradient
    right, whole = [(normalizer + held.lm_log_probs.clamp_min(-1e4))[:, None]], [normalizer[:, None]]
    for found in held.evidence.memories:
        scores = _scores(found, width, temperature, forgetting)
        whole.append(scores)
        right.append(scores.masked_fill(found.tokens != held.targets[:, None], -torch.inf))
    log_p = torch.cat(right, dim=1).logsumexp(dim=1) - torch.cat(whole, dim=1).logsumexp(dim=1)
    if interpolation_weight is None:
        return log_p
    found = held.evidence.memories[0]
    scores = _scores(found, width, interpolation_temperature, 0.0).clamp_min(-1e9)
    matching = scores.masked_fill(~found.present | (found.tokens != held.targets[:, None]), -1e9)
    again = (matching.logsumexp(dim=1) - scores.logsumexp(dim=1)).clamp_min(-1e4)
    mixed = torch.logaddexp(log_p + torch.log1p(-interpolation_weight), again + interpolation_weight.log())
    return torch.where(found.present.any(dim=1), mixed, log_p)


def _scores(found: Found, width: int, temperature: Tensor | float, forgetting: Tensor | float) -> Tensor:
    """Return the score of every entry, shape (n, k)."""
    near, ages = (-found.distances, found.present), found.ages
    return ops.scaled_similarities(*near, width, temperature, ages, forgetting, found.log_counts)


def _sample(held: HeldOut) -> HeldOut:
    """Return targets spread evenly over the text."""
    neighbors = sum(found.tokens.shape[1] for found in held.evidence.memories)
    size = min(max(_SCORES // neighbors, _LEAST), _MOST, len(held))
    return held.rows(torch.linspace(0, len(held) - 1, size).long().numpy())


def _descend(loss: Callable[[Tensor], Tensor], starts: list[list[float]]) -> tuple[Tensor, float]:
    """Return the parameters found from the best of some starts, and their loss."""
    with torch.no_grad():
        start = min(starts, key=lambda start: float(loss(torch.tensor(start, dtype=torch.float64))))
    return descend(loss, [start], steps=_STEPS)


def _typical_temperature(held: HeldOut) -> float:
    """Return the T at which typical similarities of a row differ by about one nat."""
    known_normalizer(held.evidence.belief)
    assert held.evidence.belief is not None
    products = torch.cat([found.distances[found.present] for found in held.evidence.memories])
    spread = float(products.std()) if len(products) > 1 else 1.0
    return max(spread / held.evidence.belief.keys.shape[1] ** 0.5, 1e-6)
