"""Mixtures: how the memory's distribution and the model's become one."""

from ._by_distance import BucketMixture as BucketMixture
from ._by_distance import ExponentialMixture as ExponentialMixture
from ._by_distance import LogisticMixture as LogisticMixture
from ._fit import best_weight as best_weight
from ._fixed import KnnMixture as KnnMixture
from ._mixture import Mixture as Mixture
from ._saved import load_mixture as load_mixture

__all__ = [
    "BucketMixture",
    "ExponentialMixture",
    "KnnMixture",
    "LogisticMixture",
    "Mixture",
    "best_weight",
    "load_mixture",
]
