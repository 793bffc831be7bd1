"""What every fitted method makes of the test text: its row in the table."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..mixtures import HeldOut, Mixture, memory_likelihoods, perplexity
from ._bootstrap import paired_bootstrap
from ._comparison import Row
from ._methods import Fitted, Methods
from ._retrieval import Retrieved, Text

_THRESHOLD = 0.01  # a change of the probability by so much, relatively, counts as help or harm


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


def rows_of(
    methods: Methods, results: dict[str, Judged], held: HeldOut, found: Retrieved, text: Text
) -> tuple[Row, ...]:
    """Return the table: the model alone, then every method."""
    documents, lm = text.document_of_target, held.lm_log_probs.double()
    fixed, cache = results["knn-lm"].log_probs, results[methods.best_cache].log_probs
    shuffle = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))

    def row(name: str, log_probs: Tensor, seconds: float, shuffled: float | None) -> Row:
        item = methods.fitted.get(name)
        return Row(
            method=name,
            settings="" if item is None else item.mixture.describe(),
            perplexity=perplexity(-float(log_probs.mean())),
            over_fixed=paired_bootstrap((log_probs - fixed).numpy(), documents),
            over_cache=paired_bootstrap((log_probs - cache).numpy(), documents),
            helped=float((log_probs - lm > math.log1p(_THRESHOLD)).double().mean()),
            hurt=float((log_probs - lm < -math.log1p(_THRESHOLD)).double().mean()),
            searched=0.0 if item is None else _searched(item, held),
            tokens_per_second=len(held) / max(found.model_seconds + seconds, 1e-9),
            fit_seconds=0.0 if item is None else item.seconds,
            parameters=0 if item is None else _parameters(item.mixture),
            shuffled=shuffled,
        )

    rows = [row("lm", lm, 0.0, None)]
    for name, result in results.items():
        weights, memories = result.weights, methods.fitted[name].memories
        shuffled = None
        if len(weights[weights > 0].unique()) > 1:  # a memory that found nothing has λ = 0 whatever the method
            some = torch.stack([held.evidence.memories[place].present.any(dim=1) for place in memories], dim=1)
            other = mixed(weights[shuffle] * some, result.likelihoods, held.lm_log_probs)
            shuffled = perplexity(-float(other.mean()))
        searching = sum(found.search_seconds[place] for place in memories)
        rows.append(row(name, result.log_probs, result.seconds + searching, shuffled))
    return tuple(rows)


def _searched(fitted: Fitted, held: HeldOut) -> float:
    """Return the share of targets for which the datastore has to be searched."""
    belief = held.evidence.belief
    wanted = None if belief is None else fitted.mixture.wanted(belief)
    return float(0 in fitted.memories) * (1.0 if wanted is None else float(wanted.double().mean()))


def _parameters(mixture: Mixture) -> int:
    network = getattr(mixture, "network", None)
    return (network.parameters if network is not None else 0) + sum(
        _parameters(member) for member in getattr(mixture, "members", ())
    )
