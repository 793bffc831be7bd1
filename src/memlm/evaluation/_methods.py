"""Every way to choose λ, fitted to held-out text for a datastore and a cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

from ..mixtures import HeldOut, KnnMixture, Mixture, fit_cache, fit_gate, fit_shared_cache, fits_of, spread
from ._retrieval import Retrieved, Text
from ._tune import tune_cached

_SAMPLE = 1 << 14  # targets by which caches are compared


class Fitted(NamedTuple):
    """A mixture with the memories that it uses, by place, and the time that fitting took."""

    mixture: Mixture
    memories: tuple[int, ...]
    seconds: float


class Methods(NamedTuple):
    """Every method by its name, and the name of the better cache."""

    fitted: dict[str, Fitted]
    best_cache: str


def fit_all(held: HeldOut, found: Retrieved, text: Text) -> Methods:
    """Fit every method, for a datastore and a cache in this order."""
    result: dict[str, Fitted] = {}

    def add(name: str, memories: tuple[int, ...], make: Callable[[], Mixture]) -> Mixture:
        started = time.perf_counter()
        mixture = make()
        result[name] = Fitted(mixture, memories, time.perf_counter() - started)
        return mixture

    past, stored = held.memory(1), held.memory(0)
    caches = {
        "cache": lambda: fit_cache(past, forgets=False),
        "cache, by age": lambda: fit_cache(past, forgets=True),
        "shared cache": lambda: fit_shared_cache(past, forgets=False),
        "shared cache, by age": lambda: fit_shared_cache(past, forgets=True),
    }
    for name, make in caches.items():
        add(name, (1,), make)
    some = past.rows(spread(len(past), _SAMPLE))
    best = max(caches, key=lambda name: float(some.log_probs(result[name].mixture).mean()))
    best_cache = result[best].mixture
    one = dataclasses.replace(found, evidence=stored.evidence)
    base = add("knn-lm", (0,), lambda: tune_cached(one, text.document_of_target).best)
    assert isinstance(base, KnnMixture)
    fits = fits_of(stored, base)
    for kind in fits:
        if kind != "knn":
            add(kind, (0,), fits[kind])
    adapter = result["adapter"].mixture
    add("knn-lm + cache", (0, 1), lambda: fit_gate(held, (base, best_cache)))
    add("adapter + cache", (0, 1), lambda: fit_gate(held, (adapter, best_cache)))
    return Methods(result, best)
