"""Every way to choose λ side by side, fitted to one pass over `valid` and judged on one pass over `test`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import Cache
from ..datastore import Datastore
from ..evidence import SQUARED_L2
from ..mixtures import (
    HeldOut,
    KnnMixture,
    LearnedMixture,
    Mixture,
    check_memory,
    fit_cache,
    fit_gate,
    fit_shared_cache,
    fits_of,
    memory_likelihoods,
    skipping_curve,
)
from ..models import LanguageModel
from ._analysis import analyze
from ._bootstrap import paired_bootstrap, units
from ._comparison import Comparison, Row
from ._evaluate import evaluate
from ._retrieval import Retrieved, Text, gather, retrieve
from ._tune import tune_cached

_THRESHOLD = 0.01  # a change of the probability by so much, relatively, counts as help or harm


class Fitted(NamedTuple):
    """A mixture with the memories that it uses, by place, and the time that fitting took."""

    mixture: Mixture
    memories: tuple[int, ...]
    seconds: float


class Judged(NamedTuple):
    """What a mixture made of the test text.

    Attributes:
        weights: λ, shape (n, memories).
        likelihoods: p of each memory at the targets, shape (n, memories).
        log_probs: Of the mixture, float64, shape (n,).
        seconds: Time of the mixing.
    """

    weights: Tensor
    likelihoods: Tensor
    log_probs: Tensor
    seconds: float


def compare(
    lm: LanguageModel,
    memory: Datastore,
    valid: Any,
    test: Any,
    *,
    max_k: int = 1024,
    cache: int = 1024,
    max_tokens: int | None = 20_000,
    show_progress: bool = True,
) -> Comparison:
    """Fit every mixture to `valid` and report each once on `test`.

    Args:
        lm: The model that made the datastore's keys.
        memory: The datastore.
        valid: Held-out text to fit to: neither stored nor reported on.
        test: Text to report on.
        max_k: Most neighbors a target.
        cache: Tokens that the continuous cache remembers.
        max_tokens: Targets used of each text; None uses all.
        show_progress: Show rate and time left on stderr.

    Raises:
        CorpusError: No text.
        DatastoreMismatch: The datastore was built with another model, tokenizer or key site, or is not searched by
            squared L2.
    """
    check_memory(KnnMixture.kind, SQUARED_L2, memory)
    settings = {"max_k": max_k, "cache": cache, "max_tokens": max_tokens, "show_progress": show_progress}
    sides = [
        read(lm, memory, source, description=f"reading {name}", **settings)
        for name, source in (("valid", valid), ("test", test))
    ]
    return compare_read(lm, memory, *sides, show_progress=show_progress)


class Read(NamedTuple):
    """A text with what a datastore and a cache found for it."""

    text: Text
    found: Retrieved
    held: HeldOut


def read(
    lm: LanguageModel,
    memory: Datastore,
    source: Any,
    *,
    max_k: int,
    cache: int,
    max_tokens: int | None,
    show_progress: bool,
    description: str,
) -> Read:
    """Pass over a text once; see `compare`."""
    text, memories, ks = Text(lm, source, max_tokens), [memory, Cache(cache)], (min(max_k, len(memory)), cache)
    batches = retrieve(lm, text, memories, ks, beliefs=True, show_progress=show_progress, description=description)
    found = gather(list(batches))
    groups = units(text.document_of_target)[0]
    held = HeldOut(found.targets, found.lm_log_probs, found.evidence, groups, memory.statistics())
    return Read(text, found, held)


def compare_read(
    lm: LanguageModel, memory: Datastore, valid: Read, test: Read, *, show_progress: bool = False
) -> Comparison:
    """Fit to one text and judge by the other; see `compare`."""
    judged = test.held
    fitted = fit_all(valid.held, valid.found, valid.text)
    results = {name: judge(item, judged) for name, item in fitted.items()}
    rows = _rows(fitted, results, judged, test.found, test.text)
    learned = fitted["learned"].mixture
    assert isinstance(learned, LearnedMixture)
    if learned.skips:  # what it saves shows only in a pass that skips
        again = evaluate(lm, test.text, memory, learned, show_progress=show_progress)
        speed, searched = again.results[-1].tokens_per_second, again.settings["searched"]
        rows = [
            dataclasses.replace(row, tokens_per_second=speed, searched=searched) if row.method == "learned" else row
            for row in rows
        ]
    return Comparison(
        rows=tuple(rows),
        tokens=test.text.tokens,
        valid_tokens=valid.text.tokens,
        unit=units(test.text.document_of_target)[1],
        skipping=skipping_curve(judged.memory(0), dataclasses.replace(learned, threshold=0.0)),
        analysis=analyze(memory, test.text, judged, fitted, results),
        settings={
            "model": lm.name,
            "memory": {"entries": len(memory), "index": memory.index.details},
            "windows": {"context": lm.windows.context, "stride": lm.windows.stride},
            "cache": judged.evidence.memories[1].tokens.shape[1],
        },
        mixtures={name: item.mixture for name, item in fitted.items()},
    )


def fit_all(held: HeldOut, found: Retrieved, text: Text) -> dict[str, Fitted]:
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
    best_cache = result[_best(result, past)].mixture
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
    return result


def _best(fitted: dict[str, Fitted], held: HeldOut) -> str:
    return max(fitted, key=lambda name: float(held.log_probs(fitted[name].mixture).mean()))


def judge(fitted: Fitted, held: HeldOut) -> Judged:
    """Let a mixture look at every target."""
    started = time.perf_counter()
    evidence = held.evidence._replace(memories=tuple(held.evidence.memories[place] for place in fitted.memories))
    weights, likelihoods = [], []
    for part in dataclasses.replace(held, evidence=evidence).blocks(fitted.mixture.ks):
        mix = fitted.mixture.mix(part.evidence)
        weights.append(mix.weights.double())
        likelihoods.append(memory_likelihoods(mix.log_shares, part.evidence, part.targets).double())
    result = torch.cat(weights), torch.cat(likelihoods)
    return Judged(*result, mixed(*result, held.lm_log_probs), time.perf_counter() - started)


def mixed(weights: Tensor, likelihoods: Tensor, lm_log_probs: Tensor) -> Tensor:
    """Return log(Σ λ_m p_m + (1 − Σ λ_m) p_LM) of every target, float64, shape (n,)."""
    alone = (1 - weights.sum(dim=1)) * lm_log_probs.double().exp()
    return (alone + (weights * likelihoods).sum(dim=1)).clamp_min(1e-300).log()


def _rows(
    fitted: dict[str, Fitted], results: dict[str, Judged], held: HeldOut, found: Retrieved, text: Text
) -> list[Row]:
    documents, lm = text.document_of_target, held.lm_log_probs.double()
    # the better cache, chosen as the gates chose theirs: on valid
    best_cache = next(
        name
        for name, item in fitted.items()
        if item.mixture is fitted["adapter + cache"].mixture.members[1]  # type: ignore
    )
    shuffle = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))

    def row(name: str, log_probs: Tensor, seconds: float, shuffled: float | None) -> Row:
        item = fitted.get(name)
        return Row(
            method=name,
            settings="" if item is None else item.mixture.describe(),
            perplexity=math.exp(-float(log_probs.mean())),
            over_fixed=paired_bootstrap((log_probs - results["knn-lm"].log_probs).numpy(), documents),
            over_cache=paired_bootstrap((log_probs - results[best_cache].log_probs).numpy(), documents),
            helped=float((log_probs - lm > math.log1p(_THRESHOLD)).double().mean()),
            hurt=float((log_probs - lm < -math.log1p(_THRESHOLD)).double().mean()),
            searched=float(item is not None and 0 in item.memories),
            tokens_per_second=len(held) / max(found.model_seconds + seconds, 1e-9),
            fit_seconds=0.0 if item is None else item.seconds,
            parameters=0 if item is None else _parameters(item.mixture),
            shuffled=shuffled,
        )

    rows = [row("lm", lm, 0.0, None)]
    for name, result in results.items():
        weights = result.weights
        shuffled = None
        if len(weights[weights > 0].unique()) > 1:  # a memory that found nothing has λ = 0 whatever the method
            other = mixed(weights[shuffle], result.likelihoods, held.lm_log_probs)
            shuffled = math.exp(-float(other.mean()))
        searching = sum(found.search_seconds[place] for place in fitted[name].memories)
        rows.append(row(name, result.log_probs, result.seconds + searching, shuffled))
    return rows


def _parameters(mixture: Mixture) -> int:
    network = getattr(mixture, "network", None)
    return (network.parameters if network is not None else 0) + sum(
        _parameters(member) for member in getattr(mixture, "members", ())
    )
