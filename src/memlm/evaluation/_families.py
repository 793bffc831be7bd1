"""Fitting each kind of mixture to one cached retrieval pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..mixtures import BucketMixture, ExponentialMixture, KnnMixture, LogisticMixture, Mixture, best_weight
from ..mixtures._fit import choose_buckets, fit_buckets, fit_exponential, fit_logistic, gain
from ..mixtures._mixture import nearest
from ._retrieval import Retrieved

FOLDS = 5
_TEMPERATURES = (0.5, 2**-0.5, 1.0, 2**0.5, 2.0)  # tried around the one that is best for a fixed λ


def _knn(ratio: Tensor, distances: Tensor, groups: npt.NDArray[np.int64], shared: dict[str, Any]) -> Mixture:
    return KnnMixture(interpolation_weight=best_weight(ratio), **shared)


def _buckets(ratio: Tensor, distances: Tensor, groups: npt.NDArray[np.int64], shared: dict[str, Any]) -> Mixture:
    edges, weights = fit_buckets(ratio, distances, choose_buckets(ratio, distances, groups))
    return BucketMixture(edges=edges, bucket_weights=weights, **shared)


def _exponential(ratio: Tensor, distances: Tensor, groups: npt.NDArray[np.int64], shared: dict[str, Any]) -> Mixture:
    scale, length = fit_exponential(ratio, distances)
    return ExponentialMixture(scale=scale, length=length, **shared)


def _logistic(ratio: Tensor, distances: Tensor, groups: npt.NDArray[np.int64], shared: dict[str, Any]) -> Mixture:
    scale, center, length = fit_logistic(ratio, distances)
    return LogisticMixture(scale=scale, center=center, length=length, **shared)


FITS: dict[str, Callable[..., Mixture]] = {
    "knn": _knn,
    "buckets": _buckets,
    "exponential": _exponential,
    "logistic": _logistic,
}


class Prepared(NamedTuple):
    """What the fits need of a retrieval pass over held-out text; targets without neighbors are left out.

    Attributes:
        distances: To the nearest neighbor, float32, shape (n,).
        ratios: p_kNN / p_LM of the targets at each temperature tried, float64, shape (n,).
        groups: What cross-validation holds together, int64, shape (n,).
        k: Neighbors a target.
    """

    distances: Tensor
    ratios: dict[float, Tensor]
    groups: npt.NDArray[np.int64]
    k: int

    def rows(self, rows: npt.NDArray[np.bool_]) -> Prepared:
        """Return some of the targets."""
        mask = torch.from_numpy(rows)
        ratios = {temperature: ratio[mask] for temperature, ratio in self.ratios.items()}
        return Prepared(self.distances[mask], ratios, self.groups[rows], self.k)

    def gains(self, mixture: Mixture) -> Tensor:
        """Return log(p / p_LM) of every target, float64, shape (n,); the temperature must be one of those tried."""
        distances = self.distances[:, None]
        weights = mixture.weights(distances, torch.ones_like(distances, dtype=torch.bool)).double()
        return gain(self.ratios[mixture.temperature], weights)


def prepare(cached: Retrieved, groups: npt.NDArray[np.int64], best: KnnMixture) -> Prepared:
    """Compute once what all fits share: k of the best fixed mixture, and temperatures around its own."""
    part = nearest_k(cached, best.k)
    found = part.present.any(dim=1)
    ratios = {}
    for factor in _TEMPERATURES:
        memory = memory_probabilities(part, [part.distances.shape[1]], best.temperature * factor)[:, 0]
        ratio = memory / part.lm_log_probs.double().exp().clamp_min(1e-300)
        ratios[best.temperature * factor] = ratio.clamp_max(1e30)[found]
    return Prepared(nearest(part.distances, part.present)[found], ratios, groups[found.numpy()], best.k)


def fit(kind: str, prepared: Prepared) -> Mixture:
    """Fit one kind of mixture, one of `FITS`, by likelihood, at the best of the temperatures tried."""
    fitted = []
    for temperature, ratio in prepared.ratios.items():
        shared = {"temperature": temperature, "k": prepared.k}
        mixture = FITS[kind](ratio, prepared.distances, prepared.groups, shared)
        fitted.append((float(prepared.gains(mixture).mean()), mixture))
    return max(fitted, key=lambda item: item[0])[1]


def choose(prepared: Prepared) -> str:
    """Return the kind with the best likelihood in cross-validation over the groups; "knn" for a single group."""
    fold = np.unique(prepared.groups, return_inverse=True)[1] % FOLDS
    totals = dict.fromkeys(FITS, 0.0)
    for held in np.unique(fold) if len(np.unique(fold)) > 1 else ():
        for kind in FITS:
            mixture = fit(kind, prepared.rows(fold != held))
            totals[kind] += float(prepared.rows(fold == held).gains(mixture).sum())
    return max(totals, key=lambda kind: totals[kind])


def log_probs(mixture: Mixture, cached: Retrieved) -> Tensor:
    """Return the mixture's log probability of every target of a pass, float64, shape (n,)."""
    part = nearest_k(cached, mixture.k)
    return mixture.target_log_probs(part.lm_log_probs, part.targets, part.distances, part.tokens, part.present).double()


def memory_probabilities(cached: Retrieved, ks: list[int], temperature: float, block: int = 2048) -> Tensor:
    """Return p_kNN of every target for several k, float64, shape (n, number of ks)."""
    result = []
    columns = torch.tensor(ks) - 1
    for start in range(0, len(cached.targets), block):
        rows = slice(start, start + block)
        present = cached.present[rows]
        distances = cached.distances[rows]
        scores = ((distances[:, :1] - distances) / temperature).exp().masked_fill(~present, 0.0)
        matching = scores * (cached.tokens[rows] == cached.targets[rows, None])
        total = scores.cumsum(dim=1)[:, columns].double()
        result.append(matching.cumsum(dim=1)[:, columns].double() / total.clamp_min(1e-300))
    return torch.cat(result)


def nearest_k(cached: Retrieved, k: int) -> Retrieved:
    """Return a pass with at most k neighbors a target."""
    return dataclasses.replace(
        cached,
        distances=cached.distances[:, :k],
        tokens=cached.tokens[:, :k],
        present=cached.present[:, :k],
    )
