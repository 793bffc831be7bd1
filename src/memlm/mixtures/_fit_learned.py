"""Fitting the learned weight, and choosing how many searches to skip (He et al. 2021, arXiv:2109.04212)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigError
from ._fit import gain
from ._fixed import KnnMixture
from ._folds import folds
from ._heldout import HeldOut, memory_probabilities, perplexity
from ._learned import LearnedMixture, context_features
from ._network import Network
from ._train import train

_WIDTHS = (64, 64, 1)  # the paper has four layers of 128, and a hundred times the text to fit them to
_SPARSITY = 0.05  # a in the paper: nats that a λ of 1 costs
_SHARES = np.linspace(0, 0.95, 20)


def fit_learned(held: HeldOut, base: KnnMixture, *, tolerance: float = 0.005, seed: int = 0) -> LearnedMixture:
    """Train the network on held-out text, and set its threshold so that skipping costs little.

    The threshold is chosen on targets that the network was not trained on: two networks, each fitted to half of the
    groups, judge the other half.

    Args:
        held: Evidence of one datastore, with beliefs and token statistics.
        base: The best fixed mixture; its T and k are kept.
        tolerance: Relative perplexity that skipping may cost; 0 never skips.
        seed: Of the network's start and of the order of targets.

    Raises:
        ConfigError: The held-out pass has no beliefs or no statistics.
    """
    if held.evidence.belief is None or held.statistics is None:
        raise ConfigError("the learned weight needs beliefs and the datastore's token statistics; pass both")
    mixture = _fit(held, base, seed)
    share = _share_to_skip(held, base, tolerance, seed) if tolerance > 0 else 0.0
    if share == 0:
        return mixture
    threshold = float(mixture.predicted(held.evidence.belief).quantile(share))
    return replace(mixture, threshold=threshold)


def skipping_curve(held: HeldOut, mixture: LearnedMixture) -> list[dict[str, float]]:
    """Return perplexity against the share of searches skipped, those with the smallest λ first.

    Each row is what a threshold does: targets of one λ are searched for together or not at all. So where many share
    theirs, there are fewer rows than the twenty shares from 0 to .95 that are aimed at.
    """
    assert held.evidence.belief is not None
    ratio, weight = _ratio(held, mixture.temperature, mixture.k), mixture.predicted(held.evidence.belief).double()
    return _curve(held, ratio, weight)


def _curve(held: HeldOut, ratio: Tensor, weight: Tensor) -> list[dict[str, float]]:
    ordered, order = weight.sort()
    gains = gain(ratio, weight)[order]
    kept = gains.flip(0).cumsum(0).flip(0)  # what remains from each place on
    total = float(held.lm_log_probs.double().sum())
    aimed = (min(round(share * len(weight)), len(weight) - 1) for share in _SHARES)
    # of equal λ the first: what stands before it is what the threshold skips
    starts = sorted({int(torch.searchsorted(ordered, ordered[place])) for place in aimed})
    nats = {start: -(total + float(kept[start])) / len(weight) for start in starts}
    return [{"skipped": start / len(weight), "perplexity": perplexity(nats[start])} for start in starts]


def judged_skipping_curve(held: HeldOut, base: KnnMixture, seed: int = 0) -> list[dict[str, float]]:
    """Return `skipping_curve` on targets that the network was not fitted to: each half by one of the other half.

    Empty where the targets cannot be split.
    """
    splits = folds(held.groups, 2)
    if not splits:
        return []
    weight = torch.zeros(len(held), dtype=torch.float64)
    for fitted, judged in splits:
        part = held.rows(judged)
        assert part.evidence.belief is not None
        predicted = _fit(held.rows(fitted), base, seed).predicted(part.evidence.belief)
        weight[torch.from_numpy(judged)] = predicted.double()
    return _curve(held, _ratio(held, base.temperature, base.k), weight)


def _share_to_skip(held: HeldOut, base: KnnMixture, tolerance: float, seed: int) -> float:
    curve = judged_skipping_curve(held, base, seed)
    return max(
        (row["skipped"] for row in curve if row["perplexity"] <= curve[0]["perplexity"] * (1 + tolerance)), default=0.0
    )


def _fit(held: HeldOut, base: KnnMixture, seed: int) -> LearnedMixture:
    assert held.evidence.belief is not None
    assert held.statistics is not None
    inputs = context_features(held.evidence.belief, held.statistics)
    start = Network.new(inputs, _WIDTHS, seed)
    logit = math.log(max(base.interpolation_weight, 0.01) / max(1 - base.interpolation_weight, 0.01))
    start = start.with_last_bias(torch.tensor([logit]))
    ratio = _ratio(held, base.temperature, base.k).float()

    def losses(said: Tensor, rows: Tensor) -> Tensor:
        weight = said[:, 0].sigmoid().clamp_max(ops.LARGEST)
        return _SPARSITY * weight - torch.log1p(weight * (ratio[rows] - 1))

    settings = {"epochs": 15, "batch": 256, "learning_rate": 1e-3, "weight_decay": 0.1, "dropout": 0.2}
    network = train(start, inputs, losses, held.groups, seed=seed, **settings)
    return LearnedMixture(temperature=base.temperature, k=base.k, network=network, statistics=held.statistics)


def _ratio(held: HeldOut, temperature: float, k: int) -> Tensor:
    """Return p_kNN / p_LM of every target, float64; 1 where there is no neighbor."""
    found = held.evidence.memories[0].nearest(k)
    memory = memory_probabilities(found, held.targets, [found.tokens.shape[1]], temperature)[:, 0]
    return torch.where(found.present.any(dim=1), held.ratio(memory), 1.0)
