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

from ..datastore import Datastore
from ..mixtures import KnnMixture
from ..models import LanguageModel
from ._bootstrap import Interval, paired_bootstrap
from ._retrieval import Retrieved, Text, gather, retrieve

_OCTAVES = 8  # temperatures go from the typical distance × 2^−6 to × 2^2, in steps of half an octave


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What tuning found.

    Attributes:
        mixture: The best settings; λ = 0 where the memory does not help.
        helps: Whether the gain's 95 % interval lies above zero.
        best: The best settings on the grid, whether they help or not.
        lm_perplexity: Of the model alone, per token, on the held-out text.
        perplexity: With `best`.
        gain: Nats a token that `best` gains over the model.
        tokens: Targets in the held-out text.
        grid: One row a (k, temperature) tried: k, temperature, λ, perplexity.
    """

    mixture: KnnMixture
    helps: bool
    best: KnnMixture
    lm_perplexity: float
    perplexity: float
    gain: Interval
    tokens: int
    grid: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the grid as plain values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "grid"}
        return {
            **values,
            "mixture": self.mixture.to_dict(),
            "best": self.best.to_dict(),
            "gain": {**self.gain._asdict(), "low": _finite(self.gain.low), "high": _finite(self.gain.high)},
        }

    def verdict(self) -> str:
        """Say in one sentence whether the memory helps."""
        change = f"perplexity {self.lm_perplexity:,.2f} → {self.perplexity:,.2f} on {self.tokens:,} held-out tokens"
        best = self.best
        settings = f"λ {best.interpolation_weight:.3f}, temperature {best.temperature:.3g}, k {best.k:,}"
        if self.helps:
            return f"memory helps: {change} with {settings}; gain {self.gain}"
        return f"memory does not help here: at best {change} with {settings}; gain {self.gain}; λ is set to 0"


def tune(lm: LanguageModel, memory: Datastore, source: Any, **settings: Any) -> KnnMixture:
    """Choose λ, temperature and k by the likelihood of held-out text; see `tune_report` for the settings.

    Warns where the memory does not help; the mixture returned is then the model alone (λ = 0).
    """
    report = tune_report(lm, memory, source, **settings)
    if not report.helps:
        warnings.warn(report.verdict(), stacklevel=2)
    return report.mixture


def tune_report(
    lm: LanguageModel,
    memory: Datastore,
    source: Any,
    *,
    max_k: int = 1024,
    max_tokens: int | None = 20_000,
    show_progress: bool = True,
) -> Tuning:
    """Choose λ, temperature and k by the likelihood of held-out text, and tell how sure the gain is.

    Temperatures form a grid around the typical distance, k runs over powers of two, and λ is the exact optimum for each
    pair. Documents of the held-out text that are stored in the datastore do not see their own entries.

    Args:
        lm: The model that made the datastore's keys.
        memory: The datastore.
        source: Held-out text: neither stored nor reported on.
        max_k: Most neighbors.
        max_tokens: Targets used; None uses all.
        show_progress: Show rate and time left on stderr.

    Raises:
        CorpusError: No text.
        DatastoreMismatch: The datastore was built with another model, tokenizer or key site.
    """
    text = Text(lm, source, max_tokens)
    k = min(max_k, len(memory))
    cached = gather(list(retrieve(lm, text, memory, k, show_progress=show_progress, description="tuning")))
    return tune_cached(cached, text.document_of_target)


def tune_cached(cached: Retrieved, documents: npt.NDArray[np.int64]) -> Tuning:
    """Choose λ, temperature and k from a retrieval pass; `documents` is the document of each target, shape (n,)."""
    k = cached.distances.shape[1]
    ks = sorted({*(1 << power for power in range(k.bit_length())), k})
    typical = float(cached.distances[cached.present].median()) if cached.present.any() else 1.0
    lm = cached.lm_log_probs.double()
    coarse = [2.0 ** (step / 2 - 6) * max(typical, 1e-6) for step in range(2 * _OCTAVES + 1)]
    rows = [row for temperature in coarse for row in _try(cached, lm, ks, temperature)]
    center = min(rows, key=lambda row: row["nats"])["temperature"]
    for fine in (2**-0.25, 2**0.25):
        rows += _try(cached, lm, ks, center * fine)
    # The smallest k within a thousandth of the best: a tie is decided by the cost of searching.
    least = min(row["nats"] for row in rows)
    row = min((row for row in rows if row["nats"] <= least + 1e-3), key=lambda row: (row["k"], row["nats"]))
    best = KnnMixture(interpolation_weight=row["interpolation_weight"], temperature=row["temperature"], k=int(row["k"]))
    mixed = best.target_log_probs(
        cached.lm_log_probs,
        cached.targets,
        *(part[:, : best.k] for part in (cached.distances, cached.tokens, cached.present)),
    )
    gain = paired_bootstrap((mixed.double() - lm).numpy(), documents)
    helps = gain.low > 0 if math.isfinite(gain.low) else gain.mean > 0
    return Tuning(
        mixture=best if helps else dataclasses.replace(best, interpolation_weight=0.0),
        helps=helps,
        best=best,
        lm_perplexity=math.exp(-float(lm.mean())),
        perplexity=math.exp(-float(mixed.double().mean())),
        gain=gain,
        tokens=len(lm),
        grid=[
            {
                **{name: row[name] for name in ("k", "temperature", "interpolation_weight")},
                "perplexity": math.exp(row["nats"]),
            }
            for row in rows
        ],
    )


def _try(cached: Retrieved, lm: Tensor, ks: list[int], temperature: float) -> list[dict[str, float]]:
    """Find the best λ for every k at one temperature; neighbors come nearest first, so one running sum serves all."""
    memory = memory_probabilities(cached, ks, temperature)  # (n, number of ks)
    rows = []
    for column, k in enumerate(ks):
        ratio = (memory[:, column] / lm.exp().clamp_min(1e-300)).clamp_max(1e30)
        ratio = torch.where(cached.present.any(dim=1), ratio, 1.0)  # a row without neighbors is the model's
        weight = best_weight(ratio)
        nats = -float((lm + torch.log1p(weight * (ratio - 1))).mean())
        rows.append({"k": k, "temperature": temperature, "interpolation_weight": weight, "nats": nats})
    return rows


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


def best_weight(ratio: Tensor, steps: int = 40) -> float:
    """Return the λ in [0, 1 − 10⁻⁴] that maximizes Σ log(1 + λ (r − 1)), r = p_kNN / p_LM; the sum is concave in λ.

    Example:
        >>> best_weight(torch.tensor([2.0, 0.0])), best_weight(torch.tensor([0.5]))
        (0.0, 0.0)
    """
    excess = ratio - 1

    def slope(weight: float) -> float:
        return float((excess / (1 + weight * excess).clamp_min(1e-12)).sum())

    # λ = 1 would make a token that the memory lacks impossible; held-out text may not hold one such by chance
    if slope(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0 - 1e-4
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
