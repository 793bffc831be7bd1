"""Fitting a continuous cache: θ, the drop-off by age, and λ or α, by likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ._cache import CacheMixture, SharedCacheMixture, known_normalizer
from ._fit import best_weight
from ._heldout import HeldOut

_SAMPLE = 4096  # targets for the two or three numbers that are fitted by gradient
_AGE = 500.0  # tokens, to start with
_BLOCK = 2048


def fit_cache(held: HeldOut, *, forgets: bool) -> CacheMixture:
    """Fit the linear form.

    Args:
        held: Evidence of one cache.
        forgets: Fit a drop-off by age, too; otherwise entries of all ages count alike.
    """
    found = held.evidence.memories[0]
    sample = _sample(held)

    def loss(parameters: Tensor) -> Tensor:
        weight, scale, forgetting = parameters[0].sigmoid(), parameters[1].exp(), _forgetting(parameters, 2, forgets)
        log_p, mass = _likelihood(sample, scale, forgetting)
        weight = weight * mass.isfinite()  # an empty cache is not asked
        ratio = (log_p - sample.lm_log_probs).clamp_max(60).exp()
        return -torch.log1p(weight.clamp_max(ops.LARGEST) * (ratio - 1)).mean()

    start = _start_scale(sample)
    found_at = _descend(loss, [[-2.0, math.log(start * factor), -math.log(_AGE)] for factor in (0.3, 1.0)], forgets)
    scale, forgetting = float(found_at[1].exp()), float(_forgetting(found_at, 2, forgets))
    ratios = []
    for start_row in range(0, len(held), _BLOCK):
        part = held.rows(torch.arange(start_row, min(start_row + _BLOCK, len(held))).numpy())
        log_p, mass = _likelihood(part, scale, forgetting)
        ratio = (log_p - part.lm_log_probs).double().clamp_max(60).exp()
        ratios.append(torch.where(mass.isfinite(), ratio, 1.0))
    weight = best_weight(torch.cat(ratios))
    return CacheMixture(interpolation_weight=weight, scale=scale, forgetting=forgetting, length=found.tokens.shape[1])


def fit_shared_cache(held: HeldOut, *, forgets: bool) -> SharedCacheMixture:
    """Fit the form with one softmax; see `fit_cache`. The evidence must hold beliefs."""
    sample = _sample(held)
    normalizer = known_normalizer(sample.evidence.belief)

    def loss(parameters: Tensor) -> Tensor:
        scale, forgetting = parameters[1].exp(), _forgetting(parameters, 2, forgets)
        log_p, mass = _likelihood(sample, scale, forgetting)
        weight = ops.shared_softmax_weight(mass, normalizer, parameters[0])
        ratio = (log_p - sample.lm_log_probs).clamp_max(60).exp()
        return -torch.log1p(weight.clamp_max(ops.LARGEST) * (ratio - 1)).mean()

    scale = _start_scale(sample)
    starts = []
    for factor in (0.3, 1.0):
        _, mass = _likelihood(sample, scale * factor, 0.0)
        bias = float((normalizer - mass)[mass.isfinite()].median()) - 2 if bool(mass.isfinite().any()) else 0.0
        starts.append([bias, math.log(scale * factor), -math.log(_AGE)])
    found = _descend(loss, starts, forgets)
    return SharedCacheMixture(
        bias=float(found[0]),
        scale=float(found[1].exp()),
        forgetting=float(_forgetting(found, 2, forgets)),
        length=held.evidence.memories[0].tokens.shape[1],
    )


def _forgetting(parameters: Tensor, place: int, forgets: bool) -> Tensor:
    return parameters[place].exp() if forgets else torch.zeros(())


def _sample(held: HeldOut) -> HeldOut:
    """Return targets spread evenly over the text."""
    return held.rows(torch.linspace(0, len(held) - 1, min(_SAMPLE, len(held))).long().numpy())


def _start_scale(held: HeldOut) -> float:
    """Return the θ at which typical inner products of a row differ by about one nat."""
    found = held.evidence.memories[0]
    products = found.distances[found.present]
    return 1 / max(float(products.std()) if len(products) > 1 else 1.0, 1e-6)


def _likelihood(held: HeldOut, scale: Tensor | float, forgetting: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return log p_cache of every target and the log of the cache's whole mass, −inf where it is empty."""
    found = held.evidence.memories[0]
    assert found.ages is not None
    scores = ops.cache_scores(-found.distances, found.present, found.ages, scale, forgetting).clamp_min(-1e9)
    right = scores.masked_fill(found.tokens != held.targets[:, None], -1e9)
    some = found.present.any(dim=1)
    mass = scores.logsumexp(dim=1)
    return right.logsumexp(dim=1) - mass, mass.masked_fill(~some, -torch.inf)


def _descend(loss: Callable[[Tensor], Tensor], starts: list[list[float]], forgets: bool) -> Tensor:
    """Return the parameters, of those reached from several starts by L-BFGS, with the least loss."""
    reached = []
    for start in starts:
        parameters = torch.tensor(start, requires_grad=True)
        optimizer = torch.optim.LBFGS([parameters], max_iter=30, line_search_fn="strong_wolfe")

        def closure(parameters: Tensor = parameters, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = loss(parameters)
            value.backward()
            return value

        optimizer.step(closure)
        with torch.no_grad():
            value = float(loss(parameters))
        if math.isfinite(value):
            reached.append((value, parameters.detach()))
    return min(reached, key=lambda item: item[0])[1]
