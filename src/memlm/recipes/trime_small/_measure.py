"""Measuring a trained model: everything is tuned on `valid`, then `test` is read once, by memlm's own path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...cache import Cache
from ...datastore import Datastore
from ...evaluation import Retrieved, Text, gather, retrieve, thinned, tune_cached, units
from ...evidence import Found
from ...mixtures import HeldOut, Mixture, TrimeMixture, fit_cache, fit_gate, fit_shared_cache, fit_trime
from ...models import Scorer
from .._experiment import Measured, Row
from . import _rows as rows

Memory = Datastore | Cache
Change = Callable[[Retrieved], Retrieved]


class Method(NamedTuple):
    """A mixture, by the numbers of the memories that it is for, and whether it is to see their tokens shuffled."""

    mixture: Mixture
    places: tuple[int, ...]
    shuffled: bool = False


class Tuned(NamedTuple):
    """A pass over the validation text, in the forms in which it is tuned on.

    Attributes:
        found: The pass, with every so many-th target.
        documents: Document of each target, int64, shape (n,).
        held: The same, for fits.
    """

    found: Retrieved
    documents: np.ndarray
    held: HeldOut

    def memory(self, place: int, length: int | None = None) -> HeldOut:
        """Return what fits of one memory take, with so many of its entries alone."""
        part = self.held.memory(place)
        return part if length is None else dataclasses.replace(part, evidence=part.evidence.nearest([length]))


def read_valid(
    lm: Scorer, memories: Sequence[Memory], ks: Sequence[int], text: Text, most: int, change: Change
) -> Tuned:
    """Read the validation text, keeping about so many of its targets."""
    every = max(1, text.tokens // most)
    batches = (change(batch) for batch in retrieve(lm, text, list(memories), ks, beliefs=True, show_progress=False))
    documents = text.document_of_target[::every]
    found = gather(thinned(batches, every), len(documents))
    return Tuned(found, documents, HeldOut(found.targets, found.lm_log_probs, found.evidence, units(documents)[0]))


def read_test(
    lm: Scorer,
    memories: Sequence[Memory],
    ks: Sequence[int],
    text: Text,
    methods: Mapping[str, Method],
    shuffle: Change,
    advance: Callable[[int], None],
) -> Measured:
    """Read the test text once and let every method score it."""
    log_probs = {name: np.zeros(text.tokens) for name in (rows.NOTHING, *methods)}
    for batch in retrieve(lm, text, list(memories), ks, beliefs=True, show_progress=False):
        numbers = batch.rows.numpy()
        log_probs[rows.NOTHING][numbers] = batch.lm_log_probs
        shuffled = shuffle(batch)
        for name, method in methods.items():
            evidence = (shuffled if method.shuffled else batch).evidence
            evidence = evidence._replace(memories=tuple(evidence.memories[place] for place in method.places))
            mixed = method.mixture.target_log_probs(batch.lm_log_probs, batch.targets, evidence)
            log_probs[name][numbers] = mixed
        advance(len(numbers))
    groups, unit = units(text.document_of_target)
    settings = {name: method.mixture.describe() for name, method in methods.items()}
    return Measured(
        counts=np.bincount(groups).tolist(),
        groups=unit,
        rows={
            name: Row(np.bincount(groups, -values).tolist(), settings.get(name, ""))
            for name, values in log_probs.items()
        },
        facts={},
    )


def unchanged(batch: Retrieved) -> Retrieved:
    """Leave a batch as it is."""
    return batch


def shuffle_of(memories: Sequence[Memory], text: Text, seed: int) -> Change:
    """Return what deals out the tokens of all entries anew, so that each keeps its key and has another one's token.

    An entry has the same wrong token whoever finds it. A cache's entries are dealt over the whole text, since the
    tokens of the same document are worth something in any order.
    """
    generator = np.random.default_rng(seed)
    dealt = [
        torch.from_numpy(
            generator.permutation(
                item.values if isinstance(item, Datastore) else np.concatenate([ids[1:] for ids in text.ids])
            ).astype(np.int64)
        )
        for item in memories
    ]
    lengths = [len(ids) - 1 for ids in text.ids]
    starts = torch.from_numpy(np.repeat(np.cumsum([0, *lengths[:-1]]), lengths))  # of each target's document, (tokens,)

    def shuffle(batch: Retrieved) -> Retrieved:
        changed: list[Found] = []
        for found, tokens in zip(batch.evidence.memories, dealt, strict=True):
            first = 0 if found.ages is None else starts[batch.rows][:, None]
            changed.append(found._replace(tokens=tokens[found.entries + first]))
        return dataclasses.replace(batch, evidence=batch.evidence._replace(memories=tuple(changed)))

    return shuffle


def cache_methods(tuned: Tuned, place: int, short: int) -> dict[str, Method]:
    """Tune the continuous cache, with and without drop-off by age: linear or in one softmax, whichever is better."""
    names = {
        (rows.CACHE_SHORT, rows.CACHE_SHORT_AGE): short,
        (rows.CACHE_LONG, rows.CACHE_LONG_AGE): None,
    }
    methods = {}
    for (plain, by_age), length in names.items():
        held = tuned.memory(place, length)
        for name, forgets in ((plain, False), (by_age, True)):
            forms = [fit(held, forgets=forgets) for fit in (fit_cache, fit_shared_cache)]
            best = max(forms, key=lambda form: float(held.log_probs(form).mean()))
            methods[name] = Method(best, (place,))
    return methods


def softmax_methods(tuned: Tuned, place: int, short: int) -> dict[str, Method]:
    """Tune one softmax over the vocabulary and a cache: T alone, and T with the drop-off by age."""
    names = {
        (rows.SHORT_PLAIN, rows.SHORT, rows.SHORT_AGE): short,
        (rows.LONG_PLAIN, rows.LONG, rows.LONG_AGE): None,
    }
    methods = {}
    for (plain, by_temperature, by_age), length in names.items():
        held = tuned.memory(place, length)
        size = held.evidence.memories[0].tokens.shape[1]
        methods[plain] = Method(TrimeMixture(temperature=1.0, length=size), (place,))
        methods[by_temperature] = Method(fit_trime(held, forgets=False), (place,))
        methods[by_age] = Method(fit_trime(held), (place,))
    methods[rows.LONG_SHUFFLED] = methods[rows.LONG_AGE]._replace(shuffled=True)
    return methods


def shuffled_methods(tuned: Tuned, place: int) -> dict[str, Method]:
    """Tune to tokens that are shuffled: what is gained even so is not the memory's."""
    return {rows.LONG_SHUFFLED_TUNED: Method(fit_trime(tuned.memory(place)), (place,), shuffled=True)}


def knn_methods(tuned: Tuned, cache: Mixture) -> dict[str, Method]:
    """Tune kNN-LM on a datastore, memory 0, and a gate over it and a fitted cache, memory 1."""
    one = dataclasses.replace(tuned.found, evidence=tuned.held.memory(0).evidence)
    knn = tune_cached(one, tuned.documents).best
    return {
        rows.KNN: Method(knn, (0,)),
        rows.KNN_CACHE: Method(fit_gate(tuned.held, (knn, cache)), (0, 1)),
    }


def datastore_methods(tuned: Tuned) -> dict[str, Method]:
    """Tune one softmax over the vocabulary and a datastore, memory 0, without and with a cache, memory 1."""
    k = tuned.held.evidence.memories[0].tokens.shape[1]
    ks = [size for size in (k >> 6, k >> 4, k >> 2, k) if size]  # kNN-LM chooses its k, too
    once, twice = (
        max(
            (fit_trime(tuned.memory(0, size), interpolates=again) for size in ks),
            key=lambda form: float(tuned.memory(0).log_probs(form).mean()),
        )
        for again in (False, True)
    )
    length = tuned.held.evidence.memories[1].tokens.shape[1]
    both = dataclasses.replace(tuned.held, evidence=tuned.held.evidence.nearest([twice.k, length]))
    return {
        rows.DATASTORE_PLAIN: Method(TrimeMixture(temperature=1.0, k=k), (0,)),
        rows.DATASTORE: Method(once, (0,)),
        rows.DATASTORE_TWICE: Method(twice, (0,)),
        rows.DATASTORE_LONG: Method(fit_trime(both), (0, 1)),
        rows.DATASTORE_SHUFFLED: Method(once, (0,), shuffled=True),
    }
