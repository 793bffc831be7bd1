"""Tuning kNN-LM on held-out text: λ, temperature and k from one retrieval pass."""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigError
from ..evidence import SQUARED_L2
from ..mixtures import (
    FITTED,
    STATE_NEIGHBORS,
    STATES,
    HeldOut,
    KnnMixture,
    Mixture,
    TrimeMixture,
    best_weight,
    check_memory,
    choose,
    fit,
    folds,
    memory_probabilities,
    perplexity,
    spread,
)
from ..models import Scorer
from ..text import count
from ._bootstrap import Interval, paired_bootstrap, units
from ._evaluate import finite
from ._retrieval import Retrieved, Text, gather, retrieve, warn_if_nothing_is_found

_SAMPLE = 1 << 14  # targets by which temperatures are compared before those near the best see all
_OCTAVES = 8  # temperatures go from the typical distance × 2^−6 to × 2^2, in steps of half an octave


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What tuning found.

    Attributes:
        mixture: The best settings; λ = 0 where the memory does not help and the kind has such a λ.
        helps: Whether the gain's 95 % interval lies above zero.
        best: The best settings on the grid, whether they help or not.
        lm_perplexity: Of the model alone, per token, on the held-out text.
        perplexity: With `best`. A kind that is fitted beyond λ, T and k is judged by cross-validation: half of the text
            by what was fitted to the other half.
        gain: Nats a token that it gains over the model, judged likewise.
        tokens: Targets in the held-out text.
        grid: One row a (k, temperature) tried near the best: k, temperature, λ, perplexity.
    """

    mixture: Mixture
    helps: bool
    best: Mixture
    lm_perplexity: float
    perplexity: float
    gain: Interval
    tokens: int
    grid: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the grid as plain values; None for a perplexity that no float holds."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "grid"}
        return {
            **finite(values),
            "mixture": self.mixture.to_dict(),
            "best": self.best.to_dict(),
            "gain": self.gain.to_dict(),
        }

    def verdict(self) -> str:
        """Say in one sentence whether the memory helps."""
        tokens = count(self.tokens, "held-out token")
        change = f"perplexity {self.lm_perplexity:,.2f} → {self.perplexity:,.2f} on {tokens}"
        best = self.best
        settings = f"{best.describe()}"
        if self.helps:
            return f"memory helps: {change} with {settings}; gain {self.gain}"
        end = "leave the memory out" if self.mixture is best else "λ is set to 0"
        return f"memory does not help here: at best {change} with {settings}; gain {self.gain}; {end}"


def tune(lm: Scorer, memory: Any, source: Any, **settings: Any) -> Mixture:
    """Choose λ, temperature and k by the likelihood of held-out text; see `tune_report` for the settings.

    Warns where the memory does not help, and where nothing is found because all of the text is stored. The mixture
    returned is then the model alone (λ = 0), but for "trime", which has no such setting.
    """
    report = tune_report(lm, memory, source, **settings)
    if not report.helps:
        warnings.warn(report.verdict(), stacklevel=2)
    return report.mixture


def tune_report(
    lm: Scorer,
    memory: Any,
    source: Any,
    *,
    kind: str = "knn",
    max_k: int = 1024,
    max_tokens: int | None = 20_000,
    show_progress: bool = True,
) -> Tuning:
    """Choose λ, temperature and k by the likelihood of held-out text, and tell how sure the gain is.

    Temperatures form a grid around the typical distance, k runs over powers of two, and λ is the exact optimum for each
    pair. Documents of the held-out text that are stored in the datastore do not see their own entries; warns where
    nothing is left to find.

    Args:
        lm: The model that made the datastore's keys, or a `BlackBox` whose encoder made them.
        memory: The datastore; for "trime" see `tune_trime`.
        source: Held-out text: neither stored nor reported on.
        kind: How λ is set: "knn" (one λ), "buckets", "exponential" or "logistic" (by the nearest distance), "learned"
            (by the context, before any search), "adapter" (by neighbors and model, with p_kNN reshaped), "auto", the
            best of these in cross-validation, "spalm" or "steered" (the model's last state is changed, by four
            neighbors at most), or "trime" (one softmax with the vocabulary).
        max_k: Most neighbors.
        max_tokens: Targets used; None uses all.
        show_progress: Show rate and time left on stderr.

    Raises:
        ConfigError: The kind is not known.
        CorpusError: No text.
        DatastoreMismatch: The datastore was built with another model, tokenizer or key site, or is searched by another
            metric than the kind is for.
    """
    check_kind(kind)
    if kind == TrimeMixture.kind:
        from ._tune_trime import tune_trime  # which makes a Tuning

        return tune_trime(lm, memory, source, max_k=max_k, max_tokens=max_tokens, show_progress=show_progress)
    check_memory(kind, SQUARED_L2, memory)
    text = Text(lm, source, max_tokens)
    k = min(STATE_NEIGHBORS if kind in STATES else max_k, max_k, len(memory))
    beliefs = kind not in ("knn", "buckets", "exponential", "logistic")
    options = {"beliefs": beliefs, "hidden": kind in STATES, "show_progress": show_progress, "description": "tuning"}
    cached = gather(retrieve(lm, text, memory, [k], **options), text.tokens)
    warn_if_nothing_is_found(cached.found, 2)
    return tune_cached(cached, text.document_of_target, kind, memory.statistics() if beliefs else None)


def check_kind(kind: str) -> None:
    """Raise ConfigError unless this is a kind of mixture, or "auto"."""
    kinds = (*FITTED, *STATES, TrimeMixture.kind)
    if kind not in (*kinds, "auto"):
        raise ConfigError(f"the kind of mixture is {kind!r}; expected one of {', '.join(kinds)}, or auto")


def tune_cached(
    cached: Retrieved, documents: npt.NDArray[np.int64], kind: str = "knn", statistics: Tensor | None = None
) -> Tuning:
    """Choose λ, temperature and k from a retrieval pass.

    Args:
        cached: The pass, over one datastore.
        documents: Document of each target, int64, shape (n,).
        kind: See `tune_report`.
        statistics: `Datastore.statistics`, for the learned weight.
    """
    groups = units(documents)[0]
    held = HeldOut(cached.targets, cached.lm_log_probs, cached.evidence, groups, statistics)
    found = cached.found
    k = found.tokens.shape[1]
    ks = sorted({*(1 << power for power in range(k.bit_length())), k})
    typical = float(found.distances[found.present].median()) if found.present.any() else 1.0
    lm = cached.lm_log_probs.double()
    coarse = [2.0 ** (step / 2 - 6) * max(typical, 1e-6) for step in range(2 * _OCTAVES + 1)]
    some = held.rows(spread(len(held), _SAMPLE))
    rows = [row for temperature in coarse for row in _try(some, ks, temperature)]
    center = min(rows, key=lambda row: row["nats"])["temperature"]
    rows = [row for factor in (2**-0.25, 1.0, 2**0.25) for row in _try(held, ks, center * factor)]
    # The smallest k within a thousandth of the best: a tie is decided by the cost of searching.
    least = min(row["nats"] for row in rows)
    row = min((row for row in rows if row["nats"] <= least + 1e-3), key=lambda row: (row["k"], row["nats"]))
    best = KnnMixture(interpolation_weight=row["interpolation_weight"], temperature=row["temperature"], k=int(row["k"]))
    fixed = best
    if kind != "knn" and found.present.any():
        kind = choose(held, fixed) if kind == "auto" else kind
        best = fixed if kind == "knn" else fit(kind, held, fixed)
    mixed = held.log_probs(best) if best is fixed else _judged(kind, held, fixed, best)
    gain = paired_bootstrap((mixed - lm).numpy(), documents)
    helps = gain.low > 0 if math.isfinite(gain.low) else gain.mean > 0
    return Tuning(
        mixture=best if helps else dataclasses.replace(fixed, interpolation_weight=0.0),
        helps=helps,
        best=best,
        lm_perplexity=perplexity(-float(lm.mean())),
        perplexity=perplexity(-float(mixed.mean())),
        gain=gain,
        tokens=len(lm),
        grid=[
            {
                **{name: row[name] for name in ("k", "temperature", "interpolation_weight")},
                "perplexity": perplexity(row["nats"]),
            }
            for row in rows
        ],
    )


def _judged(kind: str, held: HeldOut, fixed: KnnMixture, best: Mixture) -> Tensor:
    """Return log-probabilities by mixtures that were not fitted to the target, float64, shape (n,).

    A network can learn thousands of targets by heart, so that what it makes of them says nothing of other text.
    """
    mixed = held.log_probs(best)
    for fitted, judged in folds(held.groups, 2):
        part = held.rows(judged)
        mixed[torch.from_numpy(judged)] = part.log_probs(fit(kind, held.rows(fitted), fixed))
    return mixed


def _try(held: HeldOut, ks: list[int], temperature: float) -> list[dict[str, float]]:
    """Find the best λ for every k at one temperature; neighbors come nearest first, so one running sum serves all."""
    found = held.evidence.memories[0]
    memory = memory_probabilities(found, held.targets, ks, temperature)  # (n, number of ks)
    some = found.present.any(dim=1)
    rows = []
    for column, k in enumerate(ks):
        ratio = held.ratio(memory[:, column])
        ratio = torch.where(some, ratio, 1.0)  # a row without neighbors is the model's
        weight = best_weight(ratio)
        nats = -float((held.lm_log_probs.double() + torch.log1p(weight * (ratio - 1))).mean())
        rows.append({"k": k, "temperature": temperature, "interpolation_weight": weight, "nats": nats})
    return rows
