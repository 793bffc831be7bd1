"""Fitting a continuous cache: θ, the drop-off by age, and λ or α, by likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ._cache import CacheMixture, SharedCacheMixture, known_normalizer
from ._fit import best_weight, descend
from ._heldout import HeldOut, spread

_SAMPLE = 2048  # targets for the two or three numbers that are fitted by gradient
_FIRST_STEPS, _LAST_STEPS = 8, 16  # from every start, and from where the best of them led
_AGE = 500.0  # tokens, to start with
_FARTHEST = 30.0  # log of θ and of 1 / τ, in size
_SHORTEST = 4.0  # log of 1 / τ, at most: then only the last token is remembered


def fit_cache(held: HeldOut, *, forgets: bool) -> CacheMixture:
    """Fit the linear form.

    Args:
        held: Evidence of one cache.
        forgets: Fit a drop-off by age, too; otherwise entries of all ages count alike.
    """
    found = held.evidence.memories[0]
    sample = _sample(held)

    def loss(parameters: Tensor) -> Tensor:
        weight, scale, forgetting = parameters[0].sigmoid(), _scale(parameters), _forgetting(parameters, forgets)
        log_p, mass = _likelihood(sample, scale, forgetting)
        weight = weight * mass.isfinite()  # an empty cache is not asked
        ratio = (log_p - sample.lm_log_probs).clamp_max(60).exp()
        return -torch.log1p(weight.clamp_max(ops.LARGEST) * (ratio - 1)).mean()

    start = _start_scale(sample)
    starts = [[-2.0, math.log(start * factor), -math.log(_AGE)] for factor in (0.3, 1.0)]
    found_at = _descend(loss, starts)
    scale, forgetting = float(_scale(found_at)), float(_forgetting(found_at, forgets))
    ratios = []
    for part in held.blocks([found.tokens.shape[1]]):
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
        scale, forgetting = _scale(parameters), _forgetting(parameters, forgets)
        log_p, mass = _likelihood(sample, scale, forgetting)
        weight = ops.shared_softmax_weight(mass, normalizer, parameters[0])
        ratio = (log_p - sample.lm_log_probs).clamp_max(60).exp()
        return -torch.log1p(weight * (ratio - 1)).mean()

    scale = _start_scale(sample)
    starts = []
    for factor in (0.3, 1.0):
        _, mass = _likelihood(sample, scale * factor, 0.0)
        bias = float((normalizer - mass)[mass.isfinite()].median()) - 2 if bool(mass.isfinite().any()) else 0.0
        starts.append([bias, math.log(scale * factor), -math.log(_AGE)])
    found = _descend(loss, starts)
    return SharedCacheMixture(
        bias=float(found[0]),
        scale=float(_scale(found)),
        forgetting=float(_forgetting(found, forgets)),
        length=held.evidence.memories[0].tokens.shape[1],
    )


def _descend(loss: Callable[[Tensor], Tensor], starts: list[list[float]]) -> Tensor:
    best, _ = descend(loss, starts, steps=_FIRST_STEPS)
    return descend(loss, [best.tolist()], steps=_LAST_STEPS)[0]


def _scale(parameters: Tensor) -> Tensor:
    return parameters[1].clamp(-_FARTHEST, _FARTHEST).exp()  # a step of the descent may go very far


def _forgetting(parameters: Tensor, forgets: bool) -> Tensor:
    return parameters[2].clamp(-_FARTHEST, _SHORTEST).exp() if forgets else torch.zeros(())


def _sample(held: HeldOut) -> HeldOut:
    """Return targets spread evenly over the text."""
    return held.rows(spread(len(held), _SAMPLE))


def _start_scale(held: HeldOut) -> float:
    """Return the θ at which typical inner products of a row differ by about one nat."""
    found = held.evidence.memories[0]
    products = found.distances[found.present]
    return 1 / max(float(products.std()) if len(products) > 1 else 1.0, 1e-6)


def _likelihood(held: HeldOut, scale: Tensor | float, forgetting: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return log p_cache of every target and the log of the cache's whole mass, −inf where it is empty."""
    found = held.evidence.memories[0]
    assert found.ages is not None
    scores = ops.cache_scores(-found.distances, found.present, found.ages, scale, forgetting)
    some = found.present.any(dim=1)
    # relative to the largest of a row, which counts as 1 however small it is; a logsumexp over nothing has no gradient
    largest = scores.detach().amax(dim=1).masked_fill(~some, 0.0)
    scores = (scores - largest[:, None]).clamp_min(-1e4)
    mass = scores.exp().sum(dim=1).clamp_min(1.0).log()  # of a largest that is 1; an empty row has no use for it
    rows, columns = (found.present & (found.tokens == held.targets[:, None])).nonzero(as_tuple=True)
    right = _logsumexp(scores[rows, columns], rows, len(scores))
    return right - mass, (mass + largest).masked_fill(~some, -torch.inf)


def _logsumexp(scores: Tensor, rows: Tensor, number: int) -> Tensor:
    """Return logsumexp of the scores of each row, shape (number,); −10⁹ for a row without."""
    largest = scores.new_full((number,), -torch.inf).scatter_reduce(0, rows, scores.detach(), "amax")
    total = scores.new_zeros(number).index_add(0, rows, (scores - largest[rows]).exp())
    none = largest.isinf()
    return (total.masked_fill(none, 1.0).log() + largest.masked_fill(none, -1e9)).to(scores.dtype)
