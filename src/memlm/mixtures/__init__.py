"""Mixtures: how what memories found and what the model says become one distribution."""

from ._adapter import AdapterMixture as AdapterMixture
from ._by_distance import BucketMixture as BucketMixture
from ._by_distance import ExponentialMixture as ExponentialMixture
from ._by_distance import LogisticMixture as LogisticMixture
from ._cache import CacheMixture as CacheMixture
from ._cache import SharedCacheMixture as SharedCacheMixture
from ._families import KINDS as FITTED
from ._families import STATES as STATES
from ._families import choose as choose
from ._families import fit as fit
from ._families import fits_of as fits_of
from ._fit import best_weight as best_weight
from ._fit_cache import fit_cache as fit_cache
from ._fit_cache import fit_shared_cache as fit_shared_cache
from ._fit_gate import fit_gate as fit_gate
from ._fit_learned import skipping_curve as skipping_curve
from ._fit_spalm import STATE_NEIGHBORS as STATE_NEIGHBORS
from ._fit_spalm import fit_spalm as fit_spalm
from ._fit_spalm import fit_steered as fit_steered
from ._fit_trime import fit_trime as fit_trime
from ._fixed import KnnMixture as KnnMixture
from ._folds import folds as folds
from ._gate import GateMixture as GateMixture
from ._heldout import HeldOut as HeldOut
from ._heldout import memory_probabilities as memory_probabilities
from ._heldout import perplexity as perplexity
from ._heldout import spread as spread
from ._learned import LearnedMixture as LearnedMixture
from ._mixture import CACHE as CACHE
from ._mixture import DatastoreMixture as DatastoreMixture
from ._mixture import Mixture as Mixture
from ._mixture import check_memory as check_memory
from ._mixture import memory_likelihoods as memory_likelihoods
from ._mixture import nearest as nearest
from ._saved import fitted_with as fitted_with
from ._saved import load_mixture as load_mixture
from ._spalm import FIRST_GATE as FIRST_GATE
from ._spalm import SpalmMixture as SpalmMixture
from ._spalm import SteeredMixture as SteeredMixture
from ._spalm import first_size as first_size
from ._storage import check_place as check_place
from ._trime import TrimeMixture as TrimeMixture

__all__ = [
    "CACHE",
    "FIRST_GATE",
    "FITTED",
    "STATES",
    "STATE_NEIGHBORS",
    "AdapterMixture",
    "BucketMixture",
    "CacheMixture",
    "DatastoreMixture",
    "ExponentialMixture",
    "GateMixture",
    "HeldOut",
    "KnnMixture",
    "LearnedMixture",
    "LogisticMixture",
    "Mixture",
    "SharedCacheMixture",
    "SpalmMixture",
    "SteeredMixture",
    "TrimeMixture",
    "best_weight",
    "check_memory",
    "check_place",
    "choose",
    "first_size",
    "fit",
    "fit_cache",
    "fit_gate",
    "fit_shared_cache",
    "fit_spalm",
    "fit_steered",
    "fit_trime",
    "fits_of",
    "fitted_with",
    "folds",
    "load_mixture",
    "memory_likelihoods",
    "memory_probabilities",
    "nearest",
    "perplexity",
    "skipping_curve",
    "spread",
]
