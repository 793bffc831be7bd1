"""Fitting each kind of mixture to one cached retrieval pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..evidence import Evidence, Found
from ._by_distance import BucketMixture, ExponentialMixture, LogisticMixture
from ._fit import best_weight, choose_buckets, fit_buckets, fit_exponential, fit_logistic, gain
from ._fit_adapter import fit_adapter
from ._fit_learned import fit_learned
from ._fit_spalm import fit_spalm, fit_steered
from ._fixed import KnnMixture
from ._folds import folds
from ._heldout import HeldOut, memory_probabilities
from ._mixture import DatastoreMixture, Mixture, nearest

Groups = npt.NDArray[np.int64]
_TEMPERATURES = (0.5, 2**-0.5, 1.0, 2**0.5, 2.0)  # tried around the one that is best for a fixed λ


def _knn(ratio: Tensor, distances: Tensor, groups: Groups, shared: dict[str, Any]) -> DatastoreMixture:
    return KnnMixture(interpolation_weight=best_weight(ratio), **shared)


def _buckets(ratio: Tensor, distances: Tensor, groups: Groups, shared: dict[str, Any]) -> DatastoreMixture:
    edges, weights = fit_buckets(ratio, distances, choose_buckets(ratio, distances, groups))
    return BucketMixture(edges=edges, bucket_weights=weights, **shared)


def _exponential(ratio: Tensor, distances: Tensor, groups: Groups, shared: dict[str, Any]) -> DatastoreMixture:
    scale, length = fit_exponential(ratio, distances)
    return ExponentialMixture(scale=scale, length=length, **shared)


def _logistic(ratio: Tensor, distances: Tensor, groups: Groups, shared: dict[str, Any]) -> DatastoreMixture:
    scale, center, length = fit_logistic(ratio, distances)
    return LogisticMixture(scale=scale, center=center, length=length, **shared)


CURVES: dict[str, Callable[..., DatastoreMixture]] = {
    "knn": _knn,
    "buckets": _buckets,
    "exponential": _exponential,
    "logistic": _logistic,
}


NETWORKS: dict[str, Callable[[HeldOut, KnnMixture], DatastoreMixture]] = {
    "learned": fit_learned,
    "adapter": fit_adapter,
}
# Of the model's last state, in the place of its distribution; they need that state of every target
STATES: dict[str, Callable[[HeldOut, KnnMixture], Mixture]] = {"spalm": fit_spalm, "steered": fit_steered}
KINDS = (*CURVES, *NETWORKS)


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

    def gains(self, mixture: DatastoreMixture) -> Tensor:
        """Return log(p / p_LM) of every target, float64, shape (n,); the temperature must be one of those tried."""
        distances = self.distances[:, None]
        found = Found(distances, torch.zeros_like(distances).long(), torch.ones_like(distances).bool(), distances)
        weights = mixture.weights(Evidence((found,))).double()
        return gain(self.ratios[mixture.temperature], weights)


def prepare(held: HeldOut, base: KnnMixture) -> Prepared:
    """Compute once what all curves share: k of the best fixed mixture, and temperatures around its own."""
    part = held.evidence.memories[0].nearest(base.k)
    some = part.present.any(dim=1)
    ratios = {}
    for factor in _TEMPERATURES:
        memory = memory_probabilities(part, held.targets, [part.tokens.shape[1]], base.temperature * factor)[:, 0]
        ratios[base.temperature * factor] = held.ratio(memory)[some]
    return Prepared(nearest(part)[some], ratios, held.groups[some.numpy()], base.k)


def fit_curve(kind: str, prepared: Prepared) -> DatastoreMixture:
    """Fit λ as a function of distance, one of `CURVES`, by likelihood, at the best of the temperatures tried."""
    fitted = []
    for temperature, ratio in prepared.ratios.items():
        shared = {"temperature": temperature, "k": prepared.k}
        mixture = CURVES[kind](ratio, prepared.distances, prepared.groups, shared)
        fitted.append((float(prepared.gains(mixture).mean()), mixture))
    return max(fitted, key=lambda item: item[0])[1]


def fits_of(held: HeldOut, base: KnnMixture) -> dict[str, Callable[[], DatastoreMixture]]:
    """Return how to fit each of `KINDS`; what the curves share is computed once, at the first."""
    prepared = cache(lambda: prepare(held, base))
    if not bool(held.evidence.memories[0].present.any()):
        return {kind: lambda: base for kind in KINDS}
    curves = {kind: (lambda kind=kind: fit_curve(kind, prepared())) for kind in CURVES}
    return curves | {kind: partial(fit_network, held, base) for kind, fit_network in NETWORKS.items()}


def fit(kind: str, held: HeldOut, base: KnnMixture) -> Mixture:
    """Fit one kind of mixture for one datastore, one of `KINDS` or `STATES`, around the best fixed one.

    Where no target has a neighbor, the fixed one is returned.
    """
    if kind in STATES:
        return STATES[kind](held, base) if bool(held.evidence.memories[0].present.any()) else base
    return fits_of(held, base)[kind]()


def choose(held: HeldOut, base: KnnMixture) -> str:
    """Return the kind with the best likelihood in cross-validation over the groups, one of those that can be fitted."""
    if not bool(held.evidence.memories[0].present.any()):
        return "knn"
    networks = dict(NETWORKS) if held.evidence.belief is not None else {}
    if held.statistics is None:
        networks.pop("learned", None)
    totals = dict.fromkeys([*CURVES, *networks], 0.0)
    prepared = prepare(held, base)
    some = held.evidence.memories[0].present.any(dim=1).numpy()
    for fitted, judged in folds(held.groups):
        for kind in CURVES:
            mixture = fit_curve(kind, prepared.rows(fitted[some]))
            totals[kind] += float(prepared.rows(judged[some]).gains(mixture).sum())
        test = held.rows(judged)
        rest = held.rows(fitted)
        for kind, fit_network in networks.items():
            mixture = fit_network(rest, base)
            totals[kind] += float((test.log_probs(mixture) - test.lm_log_probs).sum())
    return max(totals, key=lambda kind: totals[kind])
